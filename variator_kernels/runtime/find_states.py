"""The states inside a model, found again without a walk through all its modules.

A switch of levels takes microseconds only if it does not visit hundreds of modules. What a walk
found holds as long as no module was registered since outside of a list, the way from the model
down to each state is the same, and so are the children of ``Sequential`` and ``ModuleList``. (A
patched module that is written into another module's ``_modules`` by hand is the one thing that this
cannot see.)
"""

from __future__ import annotations

import functools
import operator
import weakref
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .state import STATE, State, states

_LISTS = (nn.Sequential, nn.ModuleList)


class _Changes:
    number = 0


def _registered(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    # transformers slices its list of layers in each forward, which fills a new list. Those of a
    # model are looked at anyway; and what counted here would be guarded on in a compiled graph.
    if not isinstance(module, _LISTS) and not torch.compiler.is_compiling():
        _Changes.number += 1


register_module_module_registration_hook(_registered)


class _Found(NamedTuple):
    """Weak references alone: it keeps nothing alive."""

    model: weakref.ref[nn.Module]
    changes: int
    links: tuple[tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module]], ...]
    """Parent, name and child: the way to the states."""
    tops: tuple[tuple[weakref.ref[nn.Module], weakref.ref[State]], ...]
    """Of each state the first module that holds it."""
    containers: tuple[tuple[weakref.ref[nn.Module], tuple[weakref.ref[nn.Module], ...]], ...]
    """Lists of modules, with their children."""


_found: dict[int, _Found] = {}
"""By the model's ``id``."""


def found(model: nn.Module) -> list[State]:
    """What :func:`states` gives, and raises; fast the second time."""
    known = _found.get(id(model))
    if known is not None and known.model() is model and known.changes == _Changes.number:
        current = _still_there(known)
        if current is not None:
            return current
    changes = _Changes.number
    listed = states(model)
    _found[id(model)] = _looked_up(model, changes, listed)
    return listed


def _still_there(known: _Found) -> list[State] | None:
    """The states that were found; None if the way to one is another now."""
    for parent, name, child in known.links:
        above = parent()
        if above is None or above._modules.get(name) is not child():
            return None
    for container, children in known.containers:
        holder = container()
        if holder is None or len(holder._modules) != len(children):
            return None
        if not all(map(operator.is_, [child() for child in children], holder._modules.values())):
            return None
    current: list[State] = []
    for top, state in known.tops:
        module, there = top(), state()
        if there is None or module is None or vars(module).get(STATE) is not there:
            return None
        current.append(cast(State, there))
    return current


def _looked_up(model: nn.Module, changes: int, current: list[State]) -> _Found:
    tops: dict[State, nn.Module] = {}
    links: dict[str, tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module]]] = {}
    containers: list[tuple[weakref.ref[nn.Module], tuple[weakref.ref[nn.Module], ...]]] = []
    for path, module in model.named_modules():
        if isinstance(module, _LISTS):
            container: nn.Module = module
            parts = tuple(weakref.ref(part) for part in module)
            containers.append((weakref.ref(container), parts))
        state = vars(module).get(STATE)
        if state is None or state in tops:
            continue
        tops[state] = module
        parent, names = model, path.split(".") if path else []
        for depth, name in enumerate(names):
            child = parent._modules[name]
            assert child is not None
            links[".".join(names[: depth + 1])] = weakref.ref(parent), name, weakref.ref(child)
            parent = child
    pairs = tuple((weakref.ref(tops[state]), weakref.ref(state)) for state in current)
    gone = functools.partial(_gone, id(model))
    ways = tuple(links.values())
    return _Found(weakref.ref(model, gone), changes, ways, pairs, tuple(containers))


def _gone(key: int, model: weakref.ref[nn.Module]) -> None:
    known = _found.get(key)
    if known is not None and known.model is model:  # and not of a new model in its place
        del _found[key]
