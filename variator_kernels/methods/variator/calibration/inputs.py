"""The sequences that plugins are fitted to, in chunks of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ....ops.groups import Groups, token_slots

SHARE = 5
"""Each fifth sequence is held out, or fewer:"""
HELD_OUT = 4096
"""tokens that are enough to decide on."""
RUNS = 4
"""of neighbours: those of the same text would flatter what was fitted to it."""
LEAST = 2 * SHARE
"""Sequences."""
CHUNK = 4096
"""Tokens with padding that run through the model at once; a longer sequence is a chunk alone."""


class Chunk(NamedTuple):
    """Sequences of similar length, padded on the right as far as they were not already."""

    inputs: dict[str, Tensor]
    """Arguments of the encoder, ``[B, n, ...]``."""
    mask: Tensor
    """bool ``[B, n]``."""
    held_out: bool


def chunks(
    batches: Iterable[Mapping[str, Tensor]], names: Iterable[str], multiple: int = 1
) -> list[Chunk]:
    """All sequences with a token, whatever batches they came in; ``batches`` is read once.

    Their length is a ``multiple`` of that of an encoder that would pad them itself.

    Raises:
        TypeError: a batch is not a mapping. ValueError: it has no ``attention_mask``, other
        arguments than the first, or not a row a sequence; or there are too few sequences.
    """
    rows = []
    for batch in checked(batches, names):
        mask = batch["attention_mask"] != 0
        for i in mask.any(1).nonzero()[:, 0].tolist():
            end = int(mask[i].nonzero()[-1]) + 1
            # Copies: a view would keep the batch and its padding.
            rows.append({key: given[i, :end].clone() for key, given in batch.items()})
    if len(rows) < LEAST:
        raise ValueError(f"batches must hold at least {LEAST} sequences, got {len(rows)}")
    tokens = sum(int((row["attention_mask"] != 0).sum()) for row in rows)
    share = min(1 / SHARE, HELD_OUT / tokens)
    runs = min(RUNS, len(rows) // SHARE)
    apart = [i * runs / len(rows) % 1 < share for i in range(len(rows))]
    made = []
    for held_out in (False, True):
        part = [row for i, row in enumerate(rows) if apart[i] == held_out]
        part.sort(key=lambda row: len(row["attention_mask"]))
        begin = 0
        for i in range(1, len(part) + 1):
            # Sorted: the next row would be the longest.
            if i == len(part) or (i + 1 - begin) * len(part[i]["attention_mask"]) > CHUNK:
                made.append(_chunk(part[begin:i], held_out, multiple))
                begin = i
    return made


def whole(
    batches: Iterable[Mapping[str, Tensor]], names: Iterable[str], multiple: int = 1
) -> list[Chunk]:
    """Each batch with a token as a chunk, as it is; none is held out.

    Raises:
        TypeError, ValueError: as :func:`chunks`; or there is no token at all.
    """
    made = []
    for batch in checked(batches, names):
        more = -batch["attention_mask"].shape[1] % multiple
        inputs = {
            key: F.pad(given, (0, 0) * (given.dim() - 2) + (0, more))
            for key, given in batch.items()
        }
        mask = inputs["attention_mask"] != 0
        if mask.any():
            made.append(Chunk(inputs, mask, False))
    if not made:
        raise ValueError("batches must hold at least one token, got none")
    return made


def checked(
    batches: Iterable[Mapping[str, Tensor]], names: Iterable[str]
) -> Iterator[dict[str, Tensor]]:
    """The arguments of the encoder that each batch has, ``attention_mask`` among them.

    Raises:
        TypeError, ValueError: as :func:`chunks`.
    """
    names, keys = set(names), None
    for batch in batches:
        mask = _mask(batch)
        found = sorted(key for key in batch if key in names and batch[key] is not None)
        keys = found if keys is None else keys
        if found != keys:
            raise ValueError(f"batches must hold the same arguments, got {keys} and {found}")
        for key in keys:
            if not isinstance(batch[key], Tensor) or batch[key].shape[:2] != mask.shape:
                got = list(getattr(batch[key], "shape", [])) or type(batch[key]).__name__
                raise ValueError(
                    f"batches must hold tensors of shape {list(mask.shape)} (a row a sequence), "
                    f"got {key} of {got}"
                )
        yield {key: batch[key] for key in keys}


def _mask(batch: Mapping[str, Tensor]) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(
            "batches must be several mappings such as a tokenizer returns, got one of "
            f"{type(batch).__name__}: is it a single batch, without a list around it?"
        )
    mask = batch.get("attention_mask")
    if mask is None:
        raise ValueError(f"batches must hold attention_mask, got {sorted(batch)}")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must have shape [batch, length], got {got}")
    return mask != 0


def _chunk(rows: list[dict[str, Tensor]], held_out: bool, multiple: int) -> Chunk:
    n = -(-len(rows[-1]["attention_mask"]) // multiple) * multiple

    def padded(row: Tensor) -> Tensor:
        return F.pad(row, (0, 0) * (row.dim() - 1) + (0, n - len(row)))

    inputs = {key: torch.stack([padded(row[key]) for row in rows]) for key in rows[0]}
    return Chunk(inputs, inputs["attention_mask"] != 0, held_out)


def merged_tokens(x: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """The group of each token of ``x [B, n, ..]``, and whether it is merged, both ``[B * n]``:
    padding is not, nor are kept tokens."""
    slot, used = token_slots(groups, x.shape[0] * x.shape[1])
    group = slot // groups.ratio
    return group, used if groups.kept is None else used & ~groups.kept.flatten()[group]
