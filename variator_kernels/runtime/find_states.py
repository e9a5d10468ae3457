"""The states inside a model, found again without a walk through all its modules.

A switch of levels takes microseconds only if it does not visit hundreds of modules. What a walk
found holds as long as no module was registered anywhere since, and the way from the model down to
each state is the same. (A patched module that is written into ``_modules`` by hand, past
``torch.nn``'s registration, is the one thing that this cannot see.)
"""

from __future__ import annotations

import weakref
from typing import NamedTuple, cast

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .state import STATE, State, states


class _Changes:
    number = 0


def _registered(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    _Changes.number += 1


register_module_module_registration_hook(_registered)


class _Link(NamedTuple):
    parent: weakref.ref[nn.Module]
    name: str
    child: weakref.ref[nn.Module]

    def holds(self) -> bool:
        parent = self.parent()
        return parent is not None and parent._modules.get(self.name) is self.child()


class _Found(NamedTuple):
    """Weak references alone: it keeps nothing alive."""

    changes: int
    links: tuple[_Link, ...]
    tops: tuple[tuple[weakref.ref[nn.Module], weakref.ref[State]], ...]

    def states(self) -> list[State] | None:
        """Those that were found; None if something has changed."""
        if self.changes != _Changes.number or not all(link.holds() for link in self.links):
            return None
        current: list[State] = []
        for top, state in self.tops:
            module, there = top(), state()
            if there is None:
                return None
            if module is None or vars(module).get(STATE) is not there:
                return None
            current.append(cast(State, there))
        return current


_found: weakref.WeakKeyDictionary[nn.Module, _Found] = weakref.WeakKeyDictionary()


def found(model: nn.Module) -> list[State]:
    """What :func:`states` gives, and raises; fast the second time."""
    known = _found.get(model) if isinstance(model, nn.Module) else None
    current = None if known is None else known.states()
    if current is None:
        changes = _Changes.number
        current = states(model)
        _found[model] = _looked_up(model, changes, current)
    return current


def _looked_up(model: nn.Module, changes: int, current: list[State]) -> _Found:
    """Of each state the first module that holds it, and the way there."""
    tops: dict[State, nn.Module] = {}
    links: dict[str, _Link] = {}
    for path, module in model.named_modules():
        state = vars(module).get(STATE)
        if state is None or state in tops:
            continue
        tops[state] = module
        parent, names = model, path.split(".") if path else []
        for depth, name in enumerate(names):
            child = parent._modules[name]
            assert child is not None
            key = ".".join(names[: depth + 1])
            links[key] = _Link(weakref.ref(parent), name, weakref.ref(child))
            parent = child
    pairs = tuple((weakref.ref(tops[state]), weakref.ref(state)) for state in current)
    return _Found(changes, tuple(links.values()), pairs)
