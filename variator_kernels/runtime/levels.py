"""Choosing the level of a patched model: for good, or for one context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def use_ratio(model: nn.Module, ratio: Any) -> Iterator[nn.Module]:
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
    chosen = {state: state.check(ratio) for state in found(model)}
    outer = overrides.get()
    overrides.set({**outer, **chosen})
    for state, level in chosen.items():
        state.local.override = level
    try:
        yield model
    finally:
        overrides.set(outer)
        for state in chosen:
            state.local.override = outer.get(state)
