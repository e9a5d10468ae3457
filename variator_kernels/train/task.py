"""A task's labels: which there may be, how a model of each kind answers, what is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .data import Row
from .evaluation import Correct
from .losses import IGNORED


def class_ids(rows: Sequence[Row], column: str, names: Sequence[str]) -> list[int]:
    """The label of each row: one of ``names``, or its number.

    Raises:
        ValueError: a label is neither; the message says where.
    """
    numbers = {name: i for i, name in enumerate(names)}
    numbers |= {str(i): i for i in range(len(names)) if str(i) not in numbers}
    for row in rows:
        if row.values[column] not in numbers:
            raise ValueError(
                f"{row.place} has the label {row.values[column]!r}, it must be one of "
                f"{list(names)} or its number; labels= gives a model other names"
            )
    return [numbers[row.values[column]] for row in rows]


def names_of(model: Any, given: Sequence[str] | None) -> list[str] | None:
    """The labels asked for, else those of a classifier's configuration; None: any text will do.

    Raises:
        ValueError: a classifier has another number of labels.
    """
    if model.config.is_encoder_decoder:
        return list(given) if given else None
    known = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if given and len(given) != len(known):
        raise ValueError(f"labels must be {len(known)}, as many as the model has, got {given}")
    return list(given or known)


def targets(
    rows: Sequence[Row], column: str, names: Sequence[str] | None, model: Any, tokenizer: Any
) -> tuple[list[Any], Correct | None]:
    """What goes under ``labels`` in each row, and how to tell a right answer.

    A classifier gets class numbers. An encoder-decoder gets the label's text, and answers with the
    label whose first token it finds most likely.

    Raises:
        ValueError: a label is outside the set, or two labels start with the same token.
    """
    if not model.config.is_encoder_decoder:
        assert names is not None
        return list(class_ids(rows, column, names)), _by_class
    if names is None:
        return tokenizer([row.values[column] for row in rows])["input_ids"], None
    words = tokenizer(list(names))["input_ids"]
    first = [word[0] for word in words]
    if len(set(first)) < len(first):
        raise ValueError(f"labels must differ in their first token, got {list(names)}")
    return [words[i] for i in class_ids(rows, column, names)], _by_first_token(first)


def _by_class(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    return outputs.logits.argmax(-1) == batch["labels"]


def _by_first_token(first: list[int]) -> Correct:
    def correct(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        ids = torch.tensor(first, device=outputs.logits.device)
        answer = ids[outputs.logits[:, 0, ids].argmax(-1)]
        return (answer == batch["labels"][:, 0]) & (batch["labels"][:, 0] != IGNORED)

    return correct
