"""Choosing the level of a patched model: for good, or for one context."""

from __future__ import annotations

from contextlib import AbstractContextManager, ContextDecorator
from typing import Any

from torch import nn

from .find_states import found
from .state import overrides


def set_ratio(model: nn.Module, ratio: Any) -> None:
    """Set the ratio of a patched model, for every thread, until the next call. 1 is dense.

    Args:
        model: patched, or a module that holds patched models.
        ratio: an integer for all sites; or a mapping of placements to ratios, ``{"ffn": 4}``, or to
            ratios of layers, ``{"ffn": {-2: 4, -1: 4}}``. Layers that are not named are dense,
            negative ones count from the end. Or a :class:`Plan`.

    Where the model's modules did not change since the last switch, it takes microseconds.

    Raises:
        ValueError: the model is not patched, has no plugins for ``ratio``, or other sites than a
            plan.
    """
    chosen = [(state, state.check(ratio)) for state in found(model)]
    for state, level in chosen:
        state.level = level


def use_ratio(model: nn.Module, ratio: Any) -> AbstractContextManager[nn.Module]:
    """Run ``model`` at ``ratio`` inside the ``with`` block, in this thread or asyncio task alone.

    Takes what :func:`set_ratio` takes. Blocks nest; leaving one, also by an exception, brings back
    what held outside it. A thread or an executor's job started inside the block does not inherit
    it.

    Limit: a ``torch.compile``-d model sees the innermost choice of its *thread*. Tasks of one
    event loop that interleave inside such blocks (an ``await`` in the block) can therefore see
    each other's ratio there; do not ``await`` in the block, or run compiled models in threads.

    Raises:
        ValueError: the model is not patched, or has no plugins for ``ratio``.
    """
    return _Use(model, ratio)


class _Use(ContextDecorator, AbstractContextManager[nn.Module]):
    """A class, because a generator takes longer to enter and to leave."""

    __slots__ = ("_chosen", "_given", "_outer")

    def __init__(self, model: nn.Module, ratio: Any) -> None:
        self._given = model, ratio

    def _recreate_cm(self) -> _Use:
        return _Use(*self._given)

    def __enter__(self) -> nn.Module:
        model, ratio = self._given
        self._chosen = {state: state.check(ratio) for state in found(model)}
        self._outer = overrides.get()
        overrides.set({**self._outer, **self._chosen} if self._outer else self._chosen)
        for state, level in self._chosen.items():
            state.local.override = level
        return model

    def __exit__(self, *error: object) -> None:
        overrides.set(self._outer)
        for state in self._chosen:
            state.local.override = self._outer.get(state)
