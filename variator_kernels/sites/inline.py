"""FFNs that are no module and no method: what their block's ``forward`` calls, replaced by name."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from ..runtime.state import STATE, State

NOT_RUNNING, DENSE, BEFORE, INSIDE = range(4)
"""Where the block's forward in this thread is: nowhere, or at ratio 1 with an observer; before the
FFN of a compressed sublayer, or behind its beginning."""


class Called:
    """Stands in for one of :attr:`~.family.Family.called` as an attribute of the block's class.

    While a compressed forward runs, the block finds what passes its argument through in the place
    of all but the last, and the compressed sublayer in the place of that one. The modules stay
    where they are: ``_modules`` has them, and so do hooks, LoRA and state dicts.
    """

    def __init__(self, name: str, first: bool, last: bool) -> None:
        self.name, self.first, self.last = name, first, last

    def __get__(self, block: Any, kind: type | None = None) -> Any:
        if block is None:
            return self
        own = vars(block)
        module = own["_modules"].get(self.name)
        if module is None:
            raise AttributeError(f"{type(block).__name__!r} object has no attribute {self.name!r}")
        state: State | None = own.get(STATE)
        if state is None or state.local.inline == NOT_RUNNING:
            return module
        if state.local.inline == DENSE:
            return functools.partial(block.first_at_site, module) if self.first else module
        if self.last:
            return block.last_at_site
        return block.first_passes if self.first else passes

    def __set__(self, block: Any, value: Any) -> None:
        raise TypeError(f"{self.name} must be a module, got {type(value).__name__}")


class Probability:
    """A block's dropout probability: 0 behind the beginning of a compressed FFN, which has its own
    dropout where the specification puts it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, block: Any, kind: type | None = None) -> Any:
        if block is None:
            return self
        own = vars(block)
        if self.name not in own:
            raise AttributeError(f"{type(block).__name__!r} object has no attribute {self.name!r}")
        state: State | None = own.get(STATE)
        return 0.0 if state is not None and state.local.inline == INSIDE else own[self.name]

    def __set__(self, block: Any, value: Any) -> None:
        vars(block)[self.name] = value


def passes(x: Tensor, *_: Any) -> Tensor:
    """In the place of a module between the first and the last."""
    return x


def attributes(called: tuple[str, ...], dropouts: tuple[str, ...]) -> dict[str, Any]:
    """What a patched class gets: a :class:`Called` each, a :class:`Probability` for dropouts that
    are no modules' (their paths have no dot)."""
    first, last = called[0], called[-1]
    body: dict[str, Any] = {name: Called(name, name == first, name == last) for name in called}
    return body | {name: Probability(name) for name in dropouts if name and "." not in name}


class Inline(nn.Module):
    """The FFN sublayer of a block that calls its parts one after another."""

    variator_state: State

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        local = self.variator_state.local
        ratio = self.ratio_here()  # type: ignore[operator]
        if ratio == 1 and local.observer is None:
            return super().forward(*args, **kwargs)
        outer = local.inline
        local.inline = DENSE if ratio == 1 else BEFORE
        try:
            return super().forward(*args, **kwargs)
        finally:
            local.inline = outer

    def first_at_site(self, dense: nn.Module, x: Tensor) -> Tensor:
        """At ratio 1: shows the sublayer's input, and runs what was there."""
        return self._at_site(x, dense)  # type: ignore[operator]

    def first_passes(self, x: Tensor) -> Tensor:
        self.variator_state.local.inline = INSIDE
        return x

    def last_at_site(self, x: Tensor, *_: Any) -> Tensor:
        """The compressed sublayer: the others passed its input on."""
        local = self.variator_state.local
        local.inline = NOT_RUNNING  # what describes the sublayer must find its modules
        try:
            return self._at_site(x, passes)  # type: ignore[operator]
        finally:
            local.inline = INSIDE
