"""What was made of weights, to be found by where these lie, until their memory goes."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCALARS = 8
"""A vector of so few numbers, beside other sources, is known by its values: PyTorch's compiler
makes such constants anew in each call, where weights are frozen in (a merge's bias)."""


class Place(NamedTuple):
    """Where a tensor's bytes lie, from its first to its last."""

    begin: int
    end: int


class Entry(NamedTuple):
    memories: dict[Place, Any]
    """The extension's ``Memory`` of each source."""
    storages: dict[int, weakref.ref]
    """By their ids. Not of the tensors: PyTorch refuses to swap tensors that have weak
    references."""
    places: tuple[Place, ...]
    """Of the sources, in their order."""
    owners: tuple[int, ...]
    """Ids of the storages in which these lie."""
    looked_at: list[Any]
    """The memories once more, as the extension takes them."""
    changes: int
    """How often the memories had changed when the forms were made."""
    forms: dict[Hashable, Any]


class Entries:
    """By key, and by the storages that they are of.

    A garbage collection, which ends entries, may start at any allocation: what is gone through is
    copied by ``list``, which allocates nothing while it iterates.
    """

    def __init__(self) -> None:
        self.all: dict[Hashable, Entry] = {}
        self.keys: dict[int, set[Hashable]] = {}

    def add(self, key: Hashable, entry: Entry) -> None:
        self.all[key] = entry
        for storage in entry.storages:
            self.keys.setdefault(storage, set()).add(key)

    def drop(self, key: Hashable, _: Any = None) -> None:
        entry = self.all.pop(key, None)
        for storage in () if entry is None else entry.storages:
            keys = self.keys.get(storage, set())
            keys.discard(key)
            if not keys:
                self.keys.pop(storage, None)

    def of(self, storage: torch.UntypedStorage) -> Iterator[tuple[Hashable, Entry]]:
        for key in list(self.keys.get(id(storage), ())):
            entry = self.all.get(key)
            if entry is not None:
                yield key, entry

    def __iter__(self) -> Iterator[tuple[Hashable, Entry]]:
        for key in list(self.all):
            entry = self.all.get(key)
            if entry is not None:
                yield key, entry


def moved(entry: Entry, storage: torch.UntypedStorage) -> bool:
    """Whether ``entry`` is of this storage, which has other memory by now (FSDP resizes it)."""
    if entry.storages[id(storage)]() is not storage:
        return False
    begin = storage.data_ptr()
    end = begin + storage.nbytes()
    own = (p for p, owner in zip(entry.places, entry.owners, strict=True) if owner == id(storage))
    return not all(begin <= place.begin and place.end <= end for place in own)


def is_scalars(t: Tensor) -> bool:
    return t.dim() == 1 and t.shape[0] <= SCALARS


def same_values(first: Any, second: Any) -> bool:
    """Of two looks at the same numbers; NaN is what it is."""
    return first == second or repr(first) == repr(second)


def key_of(
    sources: tuple[Tensor, ...],
) -> tuple[Hashable, tuple[Tensor, ...], tuple[list[float], ...]]:
    """By which an entry is found, the sources that are known by their places, and the values of
    the others."""
    layouts = tuple(map(layout, sources))
    some = [len(own[2]) == 1 and own[2][0] <= SCALARS for own in layouts]
    if True not in some or False not in some:
        return layouts, sources, ()
    key: list[Hashable] = []
    placed: list[Tensor] = []
    values: list[list[float]] = []
    for source, own, scalars in zip(sources, layouts, some, strict=True):
        if scalars:
            key.append(own[1:3])
            values.append(source.tolist())
        else:
            key.append(own)
            placed.append(source)
    return tuple(key), tuple(placed), tuple(values)


def layout(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_neg()
