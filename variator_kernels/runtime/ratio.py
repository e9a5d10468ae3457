"""The compression ratio of a patched model: its state, and who may change it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks

STATE = "variator_state"
"""The attribute under which every patched module refers to its model's :class:`PluginState`."""


class Active(NamedTuple):
    """What holds during one forward of the encoder."""

    mask: Tensor | None
    ratio: int


Observer = Callable[[nn.Module, Tensor, "Tensor | None", int], None]


class _Local(threading.local):
    # Set here and not as class attributes: the compiler guards on the instance's own dict.
    def __init__(self) -> None:
        self.override: int | None = None
        self.active: Active | None = None
        self.observer: Observer | None = None


class PluginState:
    """Shared by all patched modules of one model; a deep copy of the model gets its own.

    ``ratio`` is what :func:`set_ratio` chose. ``local.active`` is the mask and the ratio of the
    forward now running in this thread; ``local.override`` mirrors :func:`use_ratio` for compiled
    code, which cannot read a ``ContextVar``.
    """

    def __init__(
        self,
        *,
        family: str,
        ratio: int,
        ratios: tuple[int, ...],
        bottleneck: int,
        activation: str,
        placements: tuple[str, ...],
        backend: str,
    ) -> None:
        self.family = family
        self.ratio = ratio
        self.ratios = ratios
        self.bottleneck = bottleneck
        self.activation = activation
        self.placements = placements
        self.backend = backend
        self.trained: set[int] = set()
        self.warned = False
        self.local = _Local()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.local = _Local()

    def check(self, ratio: object) -> int:
        """``ratio`` as an integer that this model has plugins for, or 1."""
        value = checks.ratio(ratio)
        if value != 1 and value not in self.ratios:
            raise ValueError(
                f"ratio must be 1 (dense) or one that has plugins, {self.ratios}, got {value}"
            )
        return value

    def resolve(self) -> int:
        """The ratio that holds in this context: :func:`use_ratio`'s, else :func:`set_ratio`'s."""
        if torch.compiler.is_compiling():
            override = self.local.override
        else:
            override = _overrides.get().get(self)
        return self.ratio if override is None else override


@contextmanager
def observe(state: PluginState, observer: Observer) -> Iterator[None]:
    """Show ``observer`` what each FFN sublayer of the model takes, in this thread.

    It gets the patched sublayer, its input ``[B, n, d]``, the token mask and the ratio, before the
    sublayer runs.
    """
    outer = state.local.observer
    state.local.observer = observer
    try:
        yield
    finally:
        state.local.observer = outer


_overrides: ContextVar[Mapping[PluginState, int]] = ContextVar(
    "variator_ratios",
    default=MappingProxyType({}),
)


def states(model: nn.Module) -> list[PluginState]:
    """The states of every patched model inside ``model``.

    Raises:
        TypeError: ``model`` is not a module. ValueError: nothing in it is patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = dict.fromkeys(vars(m)[STATE] for m in model.modules() if STATE in vars(m))
    if not found:
        raise ValueError("model is not patched: call variator_kernels.patch(model) first")
    return list(found)


def _check(found: list[PluginState], ratio: object) -> int:
    for state in found:
        value = state.check(ratio)
    return value


def set_ratio(model: nn.Module, ratio: int) -> None:
    """Set the ratio of a patched model, for every thread, until the next call. 1 is dense.

    Raises:
        ValueError: the model is not patched, or has no plugins for ``ratio``.
    """
    found = states(model)
    value = _check(found, ratio)
    for state in found:
        state.ratio = value


@contextmanager
def use_ratio(model: nn.Module, ratio: int) -> Iterator[nn.Module]:
    """Run ``model`` at ``ratio`` inside the ``with`` block, in this thread or asyncio task alone.

    Blocks nest; leaving one, also by an exception, brings back what held outside it. A thread or
    an executor's job started inside the block does not inherit it.

    Limit: a ``torch.compile``-d model sees the innermost choice of its *thread*. Tasks of one
    event loop that interleave inside such blocks (an ``await`` in the block) can therefore see
    each other's ratio there; do not ``await`` in the block, or run compiled models in threads.

    Raises:
        ValueError: the model is not patched, or has no plugins for ``ratio``.
    """
    found = states(model)
    value = _check(found, ratio)
    outer = _overrides.get()
    _overrides.set({**outer, **dict.fromkeys(found, value)})
    for state in found:
        state.local.override = value
    try:
        yield model
    finally:
        _overrides.set(outer)
        for state in found:
            state.local.override = outer.get(state)
