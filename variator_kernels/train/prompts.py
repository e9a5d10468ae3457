"""Rows of a decoder: runs of plain text, or prompts with answers.

A row's ``labels`` are the tokens whose probability counts, :data:`~.losses.IGNORED` elsewhere and
at its first token, which follows nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .data import TEXT, Row
from .evaluation import Correct
from .losses import IGNORED
from .next_tokens import Head
from .rows import CHUNK, LEAST
from .task import class_ids

LENGTH = 512
"""Tokens of a row of plain text, where nobody says."""


def packed(
    rows: Sequence[Row], tokenizer: Any, length: int, continuation: int | None
) -> list[dict[str, Any]]:
    """Plain text as rows of ``length`` tokens, the corpus in its order and no padding.

    Paragraphs are joined by line ends. The special tokens that the tokenizer puts in front of a
    text stand in front of every row. What is left over at the end is dropped, unless it is all.

    Args:
        continuation: how many last tokens of a row have labels; None: all have.

    Raises:
        ValueError: there is not enough text, or ``length`` has no room for it.
    """
    begin = _begin(tokenizer)
    least = len(begin) + LEAST + (continuation or 0)
    if length < least:
        raise ValueError(
            f"max_length must be at least {least} ({LEAST} tokens, special ones and continuation), "
            f"got {length}"
        )
    ids: list[int] = []
    for start in range(0, len(rows), CHUNK):
        text = "".join(row.values[TEXT] + "\n" for row in rows[start : start + CHUNK])
        ids += _tokens([text], tokenizer)[0]
    size = length - len(begin)
    runs = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)] or [ids]
    if len(runs[0]) + len(begin) < least:
        raise ValueError(f"data must hold at least {least - len(begin)} tokens, got {len(ids)}")
    made = []
    for run in runs:
        row = [*begin, *run]
        counted = len(row) - 1 if continuation is None else continuation
        made.append(_row(row, counted))
    return made


def answered(
    rows: Sequence[Row],
    answers: Sequence[str],
    tokenizer: Any,
    length: int | None,
    limit: int | None,
) -> list[dict[str, Any]]:
    """Prompts, each a row's text, with their answers.

    Both are tokenised as one text. Between them stands the white space that the prompt ends with,
    else a blank.

    Args:
        length: of longer rows the prompt's beginning is cut off, behind the special tokens; None:
            it is not.
        limit: the most tokens that the model takes; None: any number.

    Raises:
        ValueError: a row is longer than the model takes, or has no prompt or no answer, or an
        answer alone is longer than ``length``.
    """
    if length is not None and limit is not None and length > limit:
        raise ValueError(f"max_length must be at most {limit}, what the model takes, got {length}")
    begin, made = _begin(tokenizer), []
    for row, answer in zip(rows, answers, strict=True):
        if not row.values[TEXT].strip() or not answer.strip():
            raise ValueError(f"{row.place} must have a prompt and an answer, one is empty")
    for row, (ids, size) in zip(rows, _joined(rows, answers, tokenizer), strict=True):
        cut = 0 if length is None else max(0, len(begin) + len(ids) - length)
        if cut >= len(ids) - size:
            raise ValueError(
                f"max_length must have room for an answer and a token of its prompt, {row.place} "
                f"has an answer of {size} tokens, got {length}"
            )
        ids = [*begin, *ids[cut:]]
        if limit is not None and len(ids) > limit:
            raise ValueError(
                f"{row.place} has {len(ids)} tokens, the model takes {limit}: cut prompts with "
                "max_length, or leave this row out"
            )
        made.append(_row(ids, size))
    return made


def answers_of(rows: Sequence[Row], column: str, names: Sequence[str]) -> list[str]:
    """Each row's answer: one of ``names``, if there are any, or its number among them.

    Raises:
        ValueError: it is neither.
    """
    if not names:
        return [row.values[column] for row in rows]
    return [names[i] for i in class_ids(rows, column, names)]


def by_label(
    model: Any, tokenizer: Any, row: Row, made: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Correct | None:
    """How to tell a right answer: by the first token in which the labels differ, of which the right
    one must be the most likely. None: ``names`` is empty, every text may be an answer.

    Args:
        row: some prompt, to tokenise labels behind.
        made: rows of :func:`answered` whose answers are among ``names``.

    Raises:
        ValueError: two labels have the same token there, or a label is cut into other tokens in one
        row than in another.
    """
    if not names:
        return None
    labels = answered([row] * len(names), names, tokenizer, None, None)
    known = [_answer(label) for label in labels]
    width = min(map(len, known))
    at = next((i for i in range(width) if len({ids[i] for ids in known}) > 1), 0)
    first = {ids[at] for ids in known}
    if len(first) < len(names) or any(_answer(one) not in known for one in made):
        raise ValueError(
            "labels must each be the same tokens in every row, and differ in the first token that "
            f"they do not share, got {list(names)} as {known}"
        )
    head, choices = Head(model), torch.tensor(sorted(first))

    def correct(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        labels: Tensor = batch["labels"]
        counted = labels != IGNORED
        place = counted.int().argmax(-1) + at
        row, ids = torch.arange(len(labels), device=labels.device), choices.to(labels.device)
        hidden = outputs.hidden_states[-1][row, place - 1]
        answer = ids[head(hidden)[:, ids].argmax(-1)]
        return (answer == labels[row, place]) & counted.any(-1)

    return correct


def _joined(
    rows: Sequence[Row], answers: Sequence[str], tokenizer: Any
) -> Iterator[tuple[list[int], int]]:
    """Of each row the tokens of prompt and answer, and how many of them are the answer's."""
    texts = [row.values[TEXT] for row in rows]
    bare = [text.rstrip() for text in texts]
    between = [text[len(short) :] or " " for text, short in zip(texts, bare, strict=True)]
    parts = zip(bare, between, answers, strict=True)
    both = [short + blank + answer.strip() for short, blank, answer in parts]
    for whole, alone in zip(_tokens(both, tokenizer), _tokens(bare, tokenizer), strict=True):
        same = 0
        while same < min(len(whole) - 1, len(alone)) and whole[same] == alone[same]:
            same += 1
        yield whole, len(whole) - same


def _tokens(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Without special tokens."""
    made: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        part = texts[start : start + CHUNK]
        made += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    return made


def _begin(tokenizer: Any) -> list[int]:
    """The special tokens that stand in front of a text."""
    ids, bare = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    places = range(len(ids) - len(bare) + 1)
    return ids[: next((i for i in places if ids[i : i + len(bare)] == bare), 0)]


def _row(ids: list[int], counted: int) -> dict[str, Any]:
    """``counted``: so many last tokens have labels."""
    prompt = len(ids) - counted
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


def _answer(row: Mapping[str, Any]) -> list[int]:
    return [token for token in row["labels"] if token != IGNORED]
