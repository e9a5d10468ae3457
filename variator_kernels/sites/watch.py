"""Noticing cheaply that a module is no longer what it was when somebody looked."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """What was seen of some modules: entries of their own tables, by identity; classes; hooks.

    Everything seen is kept alive, so no other object can take its identity. Looking again happens
    in each call of a patched sublayer, so the loops run inside ``itemgetter``, ``map`` and ``all``.
    """

    __slots__ = (
        "_absent",
        "_classes",
        "_empty",
        "_entries",
        "_filled",
        "_forwards",
        "_modules",
        "_names",
    )

    def __init__(self) -> None:
        self._names: dict[int, tuple[dict[str, Any], list[str]]] = {}
        self._entries: list[tuple[Callable[[Any], tuple], dict[str, Any], tuple]] = []
        self._absent: list[tuple[dict[str, Any], str]] = []
        self._modules: list[nn.Module] = []
        self._classes: list[type] = []
        self._forwards: list[tuple[Any, Any]] = []
        self._empty: list[Any] = []
        self._filled: list[Any] = []

    def entries(self, table: dict[str, Any], names: tuple[str, ...]) -> None:
        """Watch what ``table`` has under these names, and that it has nothing under the others."""
        self._absent += [(table, name) for name in names if name not in table]
        _, known = self._names.setdefault(id(table), (table, []))
        known += [name for name in names if name in table and name not in known]

    def start(self) -> None:
        """Remember what is there now; nothing is added after that."""
        for table, names in self._names.values():
            if names:
                getter = itemgetter(names[0], *names)  # of one name alone it would give no tuple
                self._entries.append((getter, table, getter(table)))

    def path(self, owner: Any, path: str) -> Any:
        """Watch each step of a dotted path from ``owner``; returns its end, None if it has none."""
        for name in path.split("."):
            if not isinstance(owner, nn.Module):
                return None
            table = owner._modules if name in owner._modules else vars(owner)
            self.entries(table, (name,))
            owner = table.get(name)
        return owner

    def module(self, module: nn.Module, attributes: tuple[str, ...] = ()) -> None:
        """Watch a module's class and ``forward``, hooks, parameters, and those of ``attributes``
        that it has."""
        own, kind = vars(module), type(module)
        self._modules.append(module)
        self._classes.append(kind)
        if all(known is not kind for known, _ in self._forwards):
            self._forwards.append((kind, kind.forward))
        self.entries(module._parameters, tuple(module._parameters))
        self.entries(own, ("forward", *_HOOKS, *(name for name in attributes if name in own)))
        for name in _HOOKS:
            (self._filled if own[name] else self._empty).append(own[name])

    def holds(self) -> bool:
        """Whether everything is as it was."""
        try:
            for getter, table, values in self._entries:
                if not all(map(is_, getter(table), values)):
                    return False
        except KeyError:
            return False
        for table, name in self._absent:
            if name in table:
                return False
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return False
        same = list(map(type, self._modules)) == self._classes
        return same and not any(self._empty) and all(self._filled)


def same_tensors(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether two looks at the same place gave the same tensors: a parametrised weight is computed
    anew at each, so it cannot be kept."""
    pairs = zip(first, second, strict=True)
    return all(_same(a, b) for a, b in pairs if isinstance(a, Tensor) or isinstance(b, Tensor))


def _same(a: Any, b: Any) -> bool:
    """One object, or views of one object that are alike."""
    if a is b or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b
    base = a._base
    return base is not None and base is b._base and a.data_ptr() == b.data_ptr()
