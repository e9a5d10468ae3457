"""AdapterDecompress: the adapter's parameters W_1, b_1, W_2, b_2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ... import checks, functional
from ...backends import BACKENDS
from ...ops.feed_forward import ADAPTER_ACTIVATIONS


class AdapterDecompress(nn.Module):
    """Restore ``ratio`` token-level vectors from each merged one (paper section 3.2).

    Parameters: ``w1 [r, 2d]`` (the merged vector's half first), ``b1 [r]``, ``w2 [d, r]``,
    ``b2 [d]``. ``w1`` starts as an ``nn.Linear`` does, the rest at zero: a copy.

    Args:
        hidden_size: d.
        ratio: k, at least 2.
        bottleneck: r, at least 1.
        activation: φ, ``"tanh"`` or ``"identity"``.
        backend: as in :func:`functional.adapter_decompress`.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        ratio: int,
        bottleneck: int = 64,
        activation: str = "tanh",
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = checks.ratio(hidden_size, "hidden_size")
        self.ratio = checks.ratio(ratio, least=2)
        self.bottleneck = checks.ratio(bottleneck, "bottleneck")
        self.activation = checks.choice(activation, ADAPTER_ACTIVATIONS, "activation")
        self.backend = checks.choice(backend, ("auto", *BACKENDS), "backend")
        d, r = self.hidden_size, self.bottleneck
        self.w1 = nn.Parameter(torch.empty(r, 2 * d, device=device, dtype=dtype))
        self.b1 = nn.Parameter(torch.empty(r, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(d, r, device=device, dtype=dtype))
        self.b2 = nn.Parameter(torch.empty(d, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.w1, a=math.sqrt(5))
        for zero in (self.b1, self.w2, self.b2):
            nn.init.zeros_(zero)

    def forward(
        self,
        u: Tensor,
        h: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """``u [B, ceil(n/k), d]``, ``h [B, n, d]`` to ``[B, n, d]``; packed input too."""
        return functional.adapter_decompress(
            u,
            h,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            ratio=self.ratio,
            mask=mask,
            cu_seqlens=cu_seqlens,
            activation=self.activation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, ratio={self.ratio}, bottleneck={self.bottleneck}, "
            f"activation={self.activation!r}"
        )
