"""CompressedFFN: an FFN sublayer with its plugin, outside of any patched model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import checks, functional
from ...backends import BACKENDS
from ...ops.feed_forward import FeedForward
from ...sites.feed_forward import describe
from .plugin import Plugin


class CompressedFFN(nn.Module):
    """A drop-in for an FFN sublayer that runs it on merged groups of ``ratio`` tokens.

    Args:
        ffn: a sublayer of a known family (a ``T5LayerFF``, say), or any object with a
            ``feed_forward()`` that returns a :class:`FeedForward`. A module is registered as
            ``ffn``; its parameters keep their ``requires_grad``.
        ratio, bottleneck, activation: k, r and φ of the plugin.
        backend: as in :func:`functional.compressed_ffn`.
        device, dtype: of the plugin; by default those of the FFN's weights.

    Raises:
        TypeError: ``ffn`` is neither. ValueError: an argument is out of range.
    """

    def __init__(
        self,
        ffn: Any,
        ratio: int = 4,
        bottleneck: int = 64,
        activation: str = "tanh",
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backend = checks.choice(backend, ("auto", *BACKENDS), "backend")
        self.ffn = ffn
        described = self.feed_forward()
        self.plugin = Plugin(
            described.w_out.shape[0],
            ratio,
            bottleneck,
            activation,
            device=described.w_in.device if device is None else device,
            dtype=described.w_in.dtype if dtype is None else dtype,
        )

    def feed_forward(self) -> FeedForward:
        """What the wrapped sublayer consists of now."""
        own = getattr(self.ffn, "feed_forward", None)
        return describe(self.ffn) if own is None else own()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        keep_first: int = 0,
        keep_last: int = 0,
        keep: Tensor | None = None,
    ) -> Tensor:
        """The whole sublayer: ``x [B, n, d]`` to the same shape; the rest as in ``functional``."""
        return functional.compressed_ffn(
            x,
            self.plugin.weights(),
            self.feed_forward(),
            mask=mask,
            cu_seqlens=cu_seqlens,
            keep_first=keep_first,
            keep_last=keep_last,
            keep=keep,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"
