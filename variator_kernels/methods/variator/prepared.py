"""A plugin's weights, checked against the sublayer and its input: once, until something changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...ops import checks
from ...ops.feed_forward import FeedForward, PluginWeights


class Prepared:
    """What every call of one plugin needs, kept from call to call.

    Copies and pickles of it start empty.
    """

    __slots__ = ("_asked", "_backend", "_ffn", "_parameters", "_seen", "_weights")

    def __init__(self) -> None:
        self._weights: PluginWeights | None = None
        self._parameters: list[tuple[dict[str, Any], str, Any]] = []
        self._ffn: FeedForward | None = None
        self._asked: tuple[Any, ...] = ()
        self._seen: list[tuple[Tensor, torch.Size, torch.dtype, torch.device]] = []
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
        asked = (x.dim(), x.shape[-1:], x.dtype, x.device, backend)
        weights = self._weights
        if weights is None or ffn is not self._ffn or asked != self._asked or not self._holds():
            self._weights = None  # the checks may raise
            weights, tables = plugin.weights(), [m._parameters for m in plugin.children()]
            self._backend = _checked(weights, ffn, x, backend)
            self._parameters = [(table, name, table[name]) for table in tables for name in table]
            tensors = [t for t in (*weights, *ffn) if isinstance(t, Tensor)]
            self._seen = [(t, t.shape, t.dtype, t.device) for t in tensors]
            self._ffn, self._asked, self._weights = ffn, asked, weights
        return weights, self._backend

    def _holds(self) -> bool:
        for table, name, parameter in self._parameters:
            if table.get(name) is not parameter:
                return False
        # Modules move and convert their parameters in place, so identity alone says little.
        for t, shape, dtype, device in self._seen:
            if t.dtype is not dtype or t.device != device or t.shape != shape:
                return False
        return True


def _checked(weights: PluginWeights, ffn: FeedForward, x: Tensor, backend: str) -> str:
    """The backend, after every check of the public op."""
    checks.hidden(x, None, "hidden_states")
    checks.plugin(weights, x)
    checks.feed_forward(ffn, x)
    return backends.resolve(backend, x)
