"""Which tokens of a model stay whole, as data: chosen at patching, saved with its plugins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from .. import checks

MOST = 2**31 - 1
"""Positions are counted in int64: a larger number could overflow."""


class Kept(NamedTuple):
    """The tokens that a model keeps whole in every forward."""

    first: int = 0
    """So many real tokens at the beginning of a row, and ``last`` at its end."""
    last: int = 0
    ids: tuple[int, ...] = ()
    """Token ids, sorted."""
    window: int = 64
    """Of a decoder: so many of the last keys of attention stay plain."""
    given: tuple[str, ...] = ()
    """The fields that were asked for at patching: plugin files may not change them."""


WINDOW = Kept().window
NAMES = {"first": "keep_first", "last": "keep_last", "ids": "keep", "window": "window"}
"""The fields as users and plugin files write them."""


def configure(
    keep_first: Any,
    keep_last: Any,
    keep: Iterable[int] | None,
    default: int,
    vocabulary: int,
    window: Any = WINDOW,
) -> Kept:
    """What these arguments of ``patch`` ask for; ``default`` is the family's ``keep_first``.

    ``None``, 0 for ``keep_last`` and the default ``window`` count as not given.

    Raises:
        ValueError: one does not fit; the message names it.
    """
    last = checks.integer(keep_last, "keep_last", most=MOST)
    first = default
    if keep_first is not None:
        first = checks.integer(keep_first, "keep_first", most=MOST)
    ids = () if keep is None else token_ids(keep, vocabulary)
    wide = checks.integer(window, "window", most=MOST)
    asked = {"first": keep_first is not None, "last": last > 0, "ids": keep is not None}
    asked["window"] = wide != WINDOW
    return Kept(first, last, ids, wide, tuple(name for name, given in asked.items() if given))


def token_ids(keep: Iterable[int], vocabulary: int) -> tuple[int, ...]:
    """Sorted, each once.

    Raises:
        ValueError: ``keep`` does not hold token ids of this vocabulary.
    """
    try:
        given = list(keep)
    except TypeError:
        raise ValueError(f"keep must be several token ids, (102,) for one, got {keep!r}") from None
    ids = {checks.integer(token, "keep") for token in given}
    if ids and max(ids) >= vocabulary:
        raise ValueError(
            f"keep must hold token ids below the vocabulary's size, {vocabulary}, got {max(ids)}"
        )
    return tuple(sorted(ids))


def adopted(kept: Kept, saved: Kept, source: object) -> Kept:
    """What holds once plugins from ``source``, trained with ``saved``, are in a model.

    Raises:
        ValueError: something else was asked for at patching.
    """
    for field in kept.given:
        asked, found = getattr(kept, field), getattr(saved, field)
        if asked != found:
            name = NAMES[field]
            raise ValueError(
                f"source {source} has plugins for {name}={found}, the model was patched with "
                f"{name}={asked}: patch it without {name}, or with the same"
            )
    return saved._replace(given=kept.given)


def are_among(input_ids: Tensor, ids: tuple[int, ...]) -> Tensor:
    """bool ``[B, n]``: which of ``input_ids`` are one of ``ids``."""
    rows = input_ids.reshape(-1, input_ids.shape[-1])  # as T5 does
    found = rows == ids[0]
    for token in ids[1:]:
        found = found | (rows == token)  # no list of them to copy to a device
    return found
