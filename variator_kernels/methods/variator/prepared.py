"""A plugin's weights, checked against the sublayer and its input: once, until something changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import backends
from ...ops import checks
from ...ops.feed_forward import FeedForward, PluginWeights
from ...sites.watch import Watch


class _Kept(NamedTuple):
    """What was found, and what it was found for."""

    weights: PluginWeights
    backend: str
    ffn: FeedForward
    asked: tuple[Any, ...]
    parameters: Watch
    tensors: list[Tensor]

    def holds(self, ffn: FeedForward, asked: tuple[Any, ...]) -> bool:
        if ffn is not self.ffn or asked != self.asked or not self.parameters.holds():
            return False
        # Modules move their parameters in place; shapes and dtypes are the op's to look at.
        device = asked[2]
        return all([tensor.device == device for tensor in self.tensors])


class Prepared:
    """What every call of one plugin needs, kept from call to call.

    Threads may call it at once: what is kept is replaced whole. Copies and pickles start empty.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def of(
        self, plugin: Any, ffn: FeedForward, x: Tensor, backend: str
    ) -> tuple[PluginWeights, str]:
        """The weights of ``plugin`` and the backend that runs it on ``x [B, n, d]``.

        Raises:
            ValueError: a shape, dtype, device or the backend does not fit; the message names it.
        """
        if torch.compiler.is_compiling():
            return plugin.weights(), _checked(plugin.weights(), ffn, x, backend)
        asked = (x.shape[2:], x.dtype, x.device, backend)
        kept = self._kept
        if kept is None or not kept.holds(ffn, asked):
            weights = plugin.weights()
            chosen = _checked(weights, ffn, x, backend)
            watch = Watch()
            for part in plugin.children():
                watch.entries(part._parameters, tuple(part._parameters))
            watch.start()
            tensors = [t for t in (*weights, *ffn) if isinstance(t, Tensor)]
            self._kept = kept = _Kept(weights, chosen, ffn, asked, watch, tensors)
        return kept[:2]


def _checked(weights: PluginWeights, ffn: FeedForward, x: Tensor, backend: str) -> str:
    """The backend, after every check of the public op."""
    checks.compressed_ffn(x, weights, ffn)
    return backends.resolve(backend, x)
