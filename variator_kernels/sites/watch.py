"""Noticing cheaply that a module is no longer what it was when somebody looked."""

from __future__ import annotations

from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """What was seen of some modules: entries of their own tables, by identity; classes; hooks.

    Everything seen is kept alive, so no other object can take its identity.
    """

    __slots__ = ("_classes", "_empty", "_entries", "_filled", "_forwards")

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._classes: list[tuple[nn.Module, type]] = []
        self._forwards: dict[Any, Any] = {}
        self._empty: list[Any] = []
        self._filled: list[Any] = []

    def _entry(self, table: dict[str, Any], name: str) -> None:
        self._entries[id(table), name] = (table, name, table.get(name))

    def path(self, owner: Any, path: str) -> Any:
        """Watch each step of a dotted path from ``owner``; returns its end, None if it has none."""
        for name in path.split("."):
            if not isinstance(owner, nn.Module):
                return None
            table = owner._modules if name in owner._modules else vars(owner)
            self._entry(table, name)
            owner = table.get(name)
        return owner

    def module(self, module: nn.Module, attributes: tuple[str, ...] = ()) -> None:
        """Watch a module's class and ``forward``, hooks, parameters, and those of ``attributes``
        that it has."""
        own, parameters = vars(module), module._parameters
        self._classes.append((module, type(module)))
        self._forwards[type(module)] = type(module).forward
        for name in parameters:
            self._entry(parameters, name)
        for name in ("forward", *(name for name in attributes if name in own)):
            self._entry(own, name)
        for name in _HOOKS:
            (self._filled if own[name] else self._empty).append(own[name])

    def holds(self) -> bool:
        """Whether everything is as it was."""
        for table, name, value in self._entries.values():
            if table.get(name) is not value:
                return False
        for module, kind in self._classes:
            if type(module) is not kind:
                return False
        for kind, forward in self._forwards.items():
            if kind.forward is not forward:
                return False
        return not any(self._empty) and all(self._filled)
