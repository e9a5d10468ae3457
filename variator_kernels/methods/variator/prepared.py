"""A plugin's weights, checked against the sublayer and its input: once, until something changes."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ... import backends
from ...ops import checks
from ...ops.arguments import MergeWeights
from ...ops.feed_forward import FeedForward, PluginWeights
from ...ops.known import Forms
from ...ops.self_attention import SelfAttention
from ...ops.transforms import tracing
from ...sites.watch import Watch, same_tensors
from ...sites.wrappers import check_present
from .config import VariatorConfig

Sublayer = TypeVar("Sublayer", FeedForward, SelfAttention)


class _Kept(NamedTuple):
    """What was found, and what it was found for."""

    weights: Any
    settled: Any
    backend: str
    described: Any
    asked: tuple[Any, ...]
    parameters: Watch
    plugin: weakref.ref[Any]
    forms: Forms

    def holds(self, plugin: Any, sublayer: Any, asked: tuple[Any, ...]) -> bool:
        if sublayer is not self.described or asked != self.asked or self.plugin() is not plugin:
            return False
        # Parameters are moved, converted and given other data in place.
        return self.parameters.holds() and self.forms.hold()


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
        self, plugin: Any, sublayer: Sublayer, x: Tensor, config: VariatorConfig
    ) -> tuple[Any, Sublayer, str]:
        """The weights of ``plugin``, ``sublayer`` with ``config``'s settings, and the backend that
        runs them on ``x [B, n, d]``.

        Raises:
            ValueError: a shape, dtype, device or the backend does not fit; the message names it.
        """
        backend, pack, precision = config.backend, config.pack, config.precision
        weights: Any
        if torch.compiler.is_compiling() or tracing():
            check_present(plugin)
            weights = plugin.weights()
            sublayer = sublayer._replace(pack=pack, precision=precision)
            return weights, sublayer, _checked(weights, sublayer, x, backend)
        tokens = backends.sizes_reached(x)
        asked = (x.shape[2:], tokens, x.dtype, x.device, backend, pack, precision)
        kept = self._kept
        if kept is None or not kept.holds(plugin, sublayer, asked):
            check_present(plugin)
            weights = plugin.weights()
            chosen = _checked(weights, sublayer, x, backend)
            tensors = [t for t in (*weights, *sublayer) if isinstance(t, Tensor)]
            watch, whose = _watched(plugin), weakref.ref(plugin)
            settled = sublayer._replace(pack=pack, precision=precision)
            forms = Forms(tensors)
            kept = _Kept(weights, settled, chosen, sublayer, asked, watch, whose, forms)
            self._kept = kept if same_tensors(weights, plugin.weights()) else None
        return kept[:3]


def _watched(plugin: Any) -> Watch:
    """Everything that ``plugin.weights()`` looks at; plain attributes may hide parameters."""
    watch = Watch()
    for name, tensors in _PARTS.items():
        part = watch.path(plugin, name)
        if part is None:  # in front of keys and values there is no adapter
            continue
        watch.module(part, ("activation",))
        watch.entries(vars(part), tensors)
    watch.start()
    return watch


_PARTS = {"merge": ("weight", "bias"), "adapter": ("w1", "b1", "w2", "b2")}


def _checked(weights: PluginWeights | MergeWeights, sublayer: Any, x: Tensor, backend: str) -> str:
    """The backend, after every check of the public op."""
    if isinstance(weights, MergeWeights):
        sublayer.check(x)
        checks.merge_parameters(weights.weight, weights.bias, x)
    else:
        checks.compressed_ffn(x, weights, sublayer)
    return backends.resolve(backend, x)
