"""Rows of token ids, made from read data."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from .data import TEXT, Row

Noise = Callable[[dict[str, Any], torch.Generator], dict[str, Any]]
LEAST = 8
CHUNK = 2000
"""Texts that are tokenised in one call."""


class Rows(Dataset):
    """Tokenised rows. Those with ``noise`` get it anew each time they are drawn.

    Args:
        rows: dicts with ``input_ids`` and whatever the collator takes besides.
        noise: ``noise(row, generator)`` returns the row corrupted.
        seed: with a row's number and the number of the pass it seeds ``generator``.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        noise: Noise | None = None,
        seed: int = 0,
    ) -> None:
        self.rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        self.noise = noise
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def corrupted(self, noise: Noise, seed: int) -> Rows:
        """The same rows with ``noise`` and ``seed`` in place of their own."""
        return Rows(self.rows, noise, seed)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.draw(row, 0)

    def spread(self, count: int) -> list[dict[str, Any]]:
        """``count`` rows of all lengths, or all there are; the same ones each time."""
        count = min(count, len(self))
        return [self.draw(i * len(self) // count, 0) for i in range(count)]

    def draw(self, row: int, turn: int) -> dict[str, Any]:
        if self.noise is None:
            return self.rows[row]
        # A generator of 32 bits; neighbouring seeds give unrelated streams.
        seed = hash((self.seed, turn, row)) & 0xFFFFFFFF
        return self.noise(self.rows[row], torch.Generator().manual_seed(seed))


def paragraphs(
    rows: Sequence[Row], tokenizer: Any, length: int, varied: int | None = None
) -> list[dict[str, Any]]:
    """Plain text as pieces of at most ``length`` tokens, special tokens included.

    A longer paragraph becomes several pieces. Those with less than 8 tokens of text are left out.

    Args:
        varied: the seed of other lengths: each paragraph is cut into pieces of one that is drawn
            for it, up to ``length``, each as likely. None: all have ``length``.

    Raises:
        ValueError: ``length`` leaves no room for text, or nothing is left.
    """
    shortest = tokenizer.num_special_tokens_to_add(pair=False) + LEAST
    if length < shortest:
        raise ValueError(f"max_length must be at least {shortest}, got {length}")
    texts = [row.values[TEXT] for row in rows]
    if varied is None:
        encoded = _encode([texts], tokenizer, length, overflow=True)
    else:
        draw = random.Random(varied)
        sizes = [draw.randint(shortest, length) for _ in texts]
        encoded = []
        for text, size in zip(texts, sizes, strict=True):
            encoded += _encode([[text]], tokenizer, size, overflow=True)
    pieces = [
        {"input_ids": piece["input_ids"]}
        for piece in encoded
        if len(piece["input_ids"]) >= shortest
    ]
    if not pieces:
        raise ValueError(f"data holds no paragraph of at least {LEAST} tokens")
    return pieces


def examples(
    rows: Sequence[Row],
    columns: Sequence[str],
    tokenizer: Any,
    length: int | None,
    limit: int | None,
) -> list[dict[str, Any]]:
    """One text, or a pair, a row.

    Args:
        length: longer ones are cut to this many tokens; None: they are not.
        limit: the most tokens that the model takes; None: any number.

    Raises:
        ValueError: a text is longer than the model takes, or empty.
    """
    if length is not None and limit is not None and length > limit:
        raise ValueError(f"max_length must be at most {limit}, what the model takes, got {length}")
    texts = [[row.values[name] for row in rows] for name in columns]
    made = []
    for row, encoded in zip(rows, _encode(texts, tokenizer, length), strict=True):
        size = len(encoded["input_ids"])
        if limit is not None and size > limit:
            raise ValueError(
                f"{row.place} has {size} tokens, the model takes {limit}: cut texts with "
                "max_length, or leave this row out"
            )
        if not any(row.values[name].strip() for name in columns):
            raise ValueError(f"{row.place} has no text in {list(columns)}")
        made.append(encoded)
    return made


def _encode(
    texts: list[list[str]], tokenizer: Any, length: int | None, overflow: bool = False
) -> list[dict[str, Any]]:
    made = []
    for start in range(0, len(texts[0]), CHUNK):
        encoded = tokenizer(
            *(column[start : start + CHUNK] for column in texts),
            truncation=length is not None,
            max_length=length,
            return_overflowing_tokens=overflow,
            verbose=False,
        )
        keys = [key for key in encoded if key in tokenizer.model_input_names]
        made += [{key: encoded[key][i] for key in keys} for i in range(len(encoded["input_ids"]))]
    return made
