"""A plugin's weights, checked against the sublayer and its input: once, until something changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...ops import checks
from ...ops.feed_forward import FeedForward, PluginWeights
from ...sites.watch import Watch


class Prepared:
    """What every call of one plugin needs, kept from call to call.

    Copies and pickles of it start empty.
    """

    __slots__ = ("_asked", "_backend", "_ffn", "_parameters", "_tensors", "_weights")

    def __init__(self) -> None:
        self._weights: PluginWeights | None = None
        self._parameters = Watch()
        self._ffn: FeedForward | None = None
        self._asked: tuple[Any, ...] = ()
        self._tensors: list[Tensor] = []
        self._backend = ""

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
        weights = self._weights
        if weights is None or ffn is not self._ffn or asked != self._asked or not self._holds():
            self._weights = None  # the checks may raise
            weights = plugin.weights()
            self._backend = _checked(weights, ffn, x, backend)
            self._parameters = Watch()
            for part in plugin.children():
                self._parameters.entries(part._parameters, tuple(part._parameters))
            self._parameters.start()
            self._tensors = [t for t in (*weights, *ffn) if isinstance(t, Tensor)]
            self._ffn, self._asked, self._weights = ffn, asked, weights
        return weights, self._backend

    def _holds(self) -> bool:
        if not self._parameters.holds():
            return False
        # Modules move their parameters in place; shapes and dtypes are the op's to look at.
        device = self._asked[2]
        return all([tensor.device == device for tensor in self._tensors])


def _checked(weights: PluginWeights, ffn: FeedForward, x: Tensor, backend: str) -> str:
    """The backend, after every check of the public op."""
    checks.compressed_ffn(x, weights, ffn)
    return backends.resolve(backend, x)
