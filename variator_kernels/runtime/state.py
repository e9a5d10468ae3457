"""What the patched modules of one model share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import level as levels
from .context import Context
from .level import Level, Site

STATE = "variator_state"
"""The attribute under which every patched module refers to its model's :class:`State`."""
Observer = Callable[[nn.Module, Tensor, "Tensor | None", int], None]


class Method(Protocol):
    """What a method has to offer to be put at the sites of a model."""

    config: Any
    """What was chosen when the model was patched."""

    @property
    def ratios(self) -> tuple[int, ...]:
        """Every ratio that it has parameters for."""
        ...

    def feed_forward(
        self, layer: Any, x: Tensor, ratio: int, context: Context, dense: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The output of a feed-forward site for ``x [B, n, d]``, at a ratio above 1."""
        ...

    def is_trained(self, layer: Any, ratio: int) -> bool:
        """Whether the parameters at a site are others than those it starts with."""
        ...


class _Local(threading.local):
    # Set here and not as class attributes: the compiler guards on the instance's own dict.
    def __init__(self) -> None:
        self.override: Level | None = None
        self.context: Context | None = None
        self.observer: Observer | None = None


class State:
    """Shared by all patched modules of one model; a deep copy of the model gets its own.

    ``level`` is what :func:`~.levels.set_ratio` chose. ``local.context`` is that of the forward now
    running in this thread; ``local.override`` mirrors :func:`~.levels.use_ratio` for compiled code,
    which cannot read a ``ContextVar``.
    """

    def __init__(
        self, family: str, method: Method, sites: tuple[Site, ...], owners: tuple[int, ...]
    ) -> None:
        """``owners``: for each site the first that is the same module."""
        self.family = family
        self.method = method
        self.sites = sites
        self.owners = owners
        self.level = Level((1,) * len(sites))
        self.trained: set[int] = set()
        self.warned = False
        self.local = _Local()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.local = _Local()

    @property
    def ratios(self) -> tuple[int, ...]:
        """Every ratio that has plugins."""
        return self.method.ratios

    @property
    def ratio(self) -> int | None:
        """The one that :func:`~.levels.set_ratio` chose for all sites; None if they differ."""
        return self.level.uniform

    def check(self, ratio: object) -> Level:
        """The level that ``ratio`` asks for, if this model has its plugins."""
        return levels.resolve(ratio, self.sites, self.ratios, self.owners)

    def current(self) -> Level:
        """The level that holds here: :func:`~.levels.use_ratio`'s, else ``set_ratio``'s."""
        if torch.compiler.is_compiling():
            override = self.local.override
        else:
            override = overrides.get().get(self)
        return self.level if override is None else override


overrides: ContextVar[Mapping[State, Level]] = ContextVar(
    "variator_levels",
    default=MappingProxyType({}),
)


def states(model: nn.Module) -> list[State]:
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


@contextmanager
def observe(state: State, observer: Observer) -> Iterator[None]:
    """Show ``observer`` what each patched sublayer of the model takes, in this thread.

    It gets the sublayer, its input ``[B, n, d]``, the token mask and the ratio, before the
    sublayer runs.
    """
    outer = state.local.observer
    state.local.observer = observer
    try:
        yield
    finally:
        state.local.observer = outer
