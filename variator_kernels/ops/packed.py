"""Packed copies of weights: made once, and again when a weight has changed.

What counts is what a weight's bytes are when somebody asks, however they got there: through
``.data``, NumPy, another process. On Linux 6.7 and newer the kernel reports which pages were
written (csrc/cpu/write_tracking.h). Elsewhere all bytes are read at every look, unless
:meth:`PackCache.freeze` was told that they stay.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import extension
from .packed_entries import Entries, Entry, Place, is_scalars, key_of, layout, moved, same_values

LITTLE = 1 << 16
"""Bytes that are read as fast as the kernel tells of them."""


class _Frozen(NamedTuple):
    memory: Any
    version: int
    storage: weakref.ref


class PackCache:
    """Packed forms by source tensors; an entry lives as long as the memory of all of them.

    Sources are strided CPU tensors. Many threads may use it at once: entries are replaced whole.
    """

    def __init__(self, track: bool = True) -> None:
        """``track``: ask the kernel what was written, where it tells."""
        self.track = track
        self._entries = Entries()
        self._memories: weakref.WeakValueDictionary[Place, Any] = weakref.WeakValueDictionary()
        self._frozen: dict[Place, _Frozen] = {}

    def get(self, sources: tuple[Tensor, ...], kind: Hashable, make: Callable[..., Any]) -> Any:
        """The packed form ``kind`` of ``sources``, from ``make(*copies)`` if there is none yet.

        ``copies`` are the sources' own values, in memory that ``make`` may keep: a source that it
        kept would live for ever, and another thread may write to it meanwhile.

        Raises:
            RuntimeError: a frozen source was written by PyTorch, and is no vector of few numbers,
                whose new values are seen.
        """
        key, placed, values = key_of(sources)
        entry = self._entries.all.get(key) or self._enter(key, placed)
        if self._frozen:
            self._check_frozen(placed, entry.places)
        changes = _changes(entry)
        if entry.changes != changes:
            entry = self._entries.all[key] = entry._replace(changes=changes, forms={})
        kept = entry.forms.get(kind)
        if kept is None or not same_values(kept[0], values):
            copies = tuple(map(_copied, sources))
            form = make(*copies)
            if _changes(entry) != changes or not _same(entry, sources, copies, values):
                return form  # written meanwhile: of neither state
            entry.forms[kind] = kept = values, form
        return kept[1]

    def freeze(self, sources: Iterable[Tensor]) -> None:
        """From now on ``sources`` are not looked at: the caller promises that they stay."""
        for source in sources:
            where = _memory(source)
            memory = self._memory_of(source)
            memory.freeze(True, torch.get_num_threads())
            gone = functools.partial(_end, self._frozen, where)
            storage = weakref.ref(source.untyped_storage(), gone)
            self._frozen[where] = _Frozen(memory, _version(source), storage)

    def thaw(self, sources: Iterable[Tensor]) -> None:
        """Undo :meth:`freeze`; what was written meanwhile counts."""
        wanted = {_memory(source) for source in sources}
        for place in [place for place in list(self._frozen) if _within(place, wanted)]:
            _end(self._frozen, place)

    def forget(self, sources: Iterable[Tensor]) -> None:
        """Free what is made of any of ``sources``; it is made again when it is asked for."""
        for key in [key for key, _ in self._made_of(sources)]:
            self._entries.drop(key)

    def nbytes(self, sources: Iterable[Tensor]) -> int:
        """Memory of what is made of ``sources``."""
        return sum(_nbytes(entry.forms) for _, entry in self._made_of(sources))

    def rules(self, sources: Iterable[Tensor]) -> dict[str, int]:
        """How writes to those of ``sources`` that are packed are noticed, and to how many bytes
        each rule applies: ``"tracked"``, ``"read"`` or ``"frozen"``."""
        rules: dict[str, int] = {}
        for where in {_memory(source) for source in sources if _is_cpu(source)}:
            memory = self._memories.get(where)
            if memory is not None:
                rules[memory.rule] = rules.get(memory.rule, 0) + where.end - where.begin
        return rules

    def reads_much(self, source: Tensor) -> bool:
        """Whether every look at ``source`` reads all of it, and that is more than a little."""
        if source.nbytes < LITTLE:
            return False
        entry = self._entries.all.get((layout(source),))
        memory = self._memories.get(_memory(source)) if entry is None else entry.looked_at[0]
        if memory is None:
            return not self.track or extension.load().why_not_tracked() != ""
        return memory.rule == "read"

    def _enter(self, key: Hashable, sources: tuple[Tensor, ...]) -> Entry:
        storages = {id(s): s for s in (source.untyped_storage() for source in sources)}
        for storage in storages.values():
            for old, entry in self._entries.of(storage):
                if moved(entry, storage):
                    self._entries.drop(old)
        gone = functools.partial(self._entries.drop, key)
        memories = {_memory(source): self._memory_of(source) for source in sources}
        entry = Entry(
            memories,
            {number: weakref.ref(storage, gone) for number, storage in storages.items()},
            tuple(map(_memory, sources)),
            tuple(id(source.untyped_storage()) for source in sources),
            list(memories.values()),
            -1,
            {},
        )
        self._entries.add(key, entry)
        return entry

    def _memory_of(self, source: Tensor) -> Any:
        where = _memory(source)
        memory = self._memories.get(where)
        if memory is None:
            # A device that writes to pinned memory does so behind the kernel's back.
            pinned = torch.cuda.is_initialized() and source.is_pinned()
            memory = extension.load().Memory(
                begin=where.begin,
                end=where.end,
                trackable=self.track and not pinned,
                threads=torch.get_num_threads(),
            )
            self._memories[where] = memory
        return memory

    def _made_of(self, sources: Iterable[Tensor]) -> Iterator[tuple[Hashable, Entry]]:
        wanted = {_memory(source) for source in sources if _is_cpu(source)}
        for key, entry in self._entries:
            if any(_within(place, wanted) for place in entry.memories):
                yield key, entry

    def _check_frozen(self, sources: tuple[Tensor, ...], places: tuple[Place, ...]) -> None:
        for source, place in zip(sources, places, strict=True):
            frozen = self._frozen.get(place)
            if frozen is not None and frozen.storage() is not source.untyped_storage():
                self.thaw([source])  # of other memory that lay there, or shares it
            elif frozen is not None and frozen.version != _version(source):
                raise RuntimeError(
                    f"a weight {tuple(source.shape)} was written after vk.freeze(model), which "
                    "promises that weights stay: call vk.thaw(model) before changing them"
                )


def _end(table: dict[Place, _Frozen], where: Place, _: Any = None) -> None:
    frozen = table.pop(where, None)
    if frozen is not None:
        frozen.memory.freeze(False, torch.get_num_threads())


def _within(place: Place, wanted: set[Place]) -> bool:
    """Whether it is one of them or a part: a fused matrix is packed, and frozen, by its parts."""
    if place in wanted:
        return True
    return any(whole.begin <= place.begin and place.end <= whole.end for whole in wanted)


def _memory(t: Tensor) -> Place:
    begin, last = t.data_ptr(), 0
    if t.numel() == 0:
        return Place(begin, begin)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        last += (size - 1) * stride
    return Place(begin, begin + (last + 1) * t.element_size())


def _copied(t: Tensor) -> Tensor:
    """``t`` in other memory, with the bytes that lie between its own."""
    count = (_memory(t).end - _memory(t).begin) // t.element_size()
    flat = t.detach().as_strided((count,), (1,))
    return flat.clone().as_strided(t.shape, t.stride())


def _same(
    entry: Entry,
    sources: Iterable[Tensor],
    copies: Iterable[Tensor],
    values: tuple[list[float], ...],
) -> bool:
    """Whether ``copies`` are what the last look saw: a value may come and go between two."""
    given = iter(values)
    for source, copy in zip(sources, copies, strict=True):
        if values and is_scalars(source):
            known = next(given)  # what is made may have read the source itself
            if not all(same_values(known, t.tolist()) for t in (copy, source)):
                return False
        elif not entry.memories[_memory(source)].holds(copy.data_ptr(), torch.get_num_threads()):
            return False
    return True


def _is_cpu(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.layout == torch.strided


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _changes(entry: Entry) -> int:
    return extension.load().changes(entry.looked_at, torch.get_num_threads())


def _nbytes(form: Any) -> int:
    """Of all tensors in nested forms."""
    if isinstance(form, Tensor):
        return form.numel() * form.element_size()
    if isinstance(form, dict):
        return sum(map(_nbytes, form.values()))
    return sum(map(_nbytes, form)) if isinstance(form, tuple) else 0


cache = PackCache()
