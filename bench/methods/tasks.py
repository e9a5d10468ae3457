"""What models are trained for and measured on: a classification task, or text."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import variator_kernels as vk
from variator_kernels.train.collate import batches, collator

from .. import internals
from ..decoder import setup
from ..projected import data as text
from ..quality import originals, tasks
from .training import Weights

Batch = dict[str, Tensor]
ROWS = 32
"""Of a batch that is timed; rows of similar length share one."""


class Task:
    """What both kinds have in common: the original, and what all methods see of the data."""

    score: str
    """What :meth:`evaluate` measures."""
    decoder: bool
    model: Any
    train: Any
    """Rows to train on."""
    collate: Callable[[list[Any]], Batch]
    calibration: list[Batch]
    """What a start may look at, the same for every method."""
    inputs: list[Batch]
    """What is timed."""
    weights: Weights

    def fresh(self) -> Any:
        """A copy of the original, to be changed."""
        return copy.deepcopy(self.model).requires_grad_(True)

    def evaluate(self, model: Any) -> dict[str, float]:
        """By the name of a split."""
        raise NotImplementedError

    def logits(self, model: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            return model(**batch).logits

    def run(self, model: Any) -> Tensor:
        """What is timed: one pass over :attr:`inputs`; the last output."""
        for batch in self.inputs:
            out = self.logits(model, batch)
        return out

    def multiply_adds(self, model: Any, ratio: Any) -> int:
        """Of :meth:`run`, in the encoder or the decoder's blocks."""
        total = 0
        for batch in self.inputs:
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            lengths = real.sum(-1).tolist()
            if hasattr(model, "multiply_adds"):
                self.logits(model, batch)
                total += model.multiply_adds() + len(lengths) * model.config.hidden_size**2
            else:
                count = vk.flops.count(model.base_model, length=lengths, ratio=ratio)
                total += count.multiply_adds.total
        return total


class Classification(Task):
    """Accuracy on a dev set, and on a test set where there is one."""

    score, decoder, weights = "accuracy", False, Weights(hidden=1.0, layers=1.0, logits=1.0)

    def __init__(self, folder: Path, name: str, data: Path, calibrate: int, count: int) -> None:
        """``folder``: of the fine-tuned original."""
        known = tasks.TASKS[name]
        self.model, self.tokenizer = originals.read(folder, task=True)
        self.collate = collator(self.tokenizer, self.model.config)
        parts = {"train": "train"} | {split: split for split in tasks.held_out(data, known)}
        self.splits = {
            split: tasks.load(data, known, split, self.model, self.tokenizer,
                              originals.LEAST[name] if split == "train" else 0)
            for split in parts
        }  # fmt: skip
        self.train = self.splits.pop("train")[0]
        self.calibration = self._batches(self.train.spread(calibrate))
        self.inputs = self._batches(self.splits["dev"][0].spread(count))

    def _batches(self, rows: list[Any]) -> list[Batch]:
        found = batches(rows, self.collate, ROWS)
        return [{k: v for k, v in batch.items() if k != "labels"} for batch in found]

    def evaluate(self, model: Any) -> dict[str, float]:
        return {
            split: originals.accuracy(model, self.tokenizer, rows, correct)
            for split, (rows, correct) in self.splits.items()
        }


class Language(Task):
    """Perplexity of a decoder on wikitext2's test text."""

    score, decoder, weights = "perplexity", True, Weights(logits=0.5, labels=0.5)

    def __init__(self, model: str, data: Path, length: int, calibrate: int, count: int) -> None:
        found = setup.whole(model)
        self.model = setup.load(found, torch.float32)
        read = text.read(data, found.tokenizer, length)
        whole = read.train[: len(read.train) // length * length].view(-1, length)
        self.train = [{"input_ids": row} for row in whole.tolist()]
        ids = read.rows(calibrate, torch.Generator().manual_seed(1))
        self.calibration = [{"input_ids": some} for some in ids.split(text.BATCH)]
        self.held_out = read.held_out(count)
        self.inputs = [{"input_ids": row[None]} for row in self.held_out[:8]]

    def collate(self, rows: list[Any]) -> Batch:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    def evaluate(self, model: Any) -> dict[str, float]:
        return {"test": math.exp(text.loss(model, self.held_out))}

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """Of a prompt's last token."""
        with torch.no_grad():
            return model(**batch, use_cache=True, logits_to_keep=1).logits[:, -1]


def parameters(model: Any) -> int:
    """As :func:`variator_kernels.merge` would leave it."""
    made = vk.merge(model) if internals.is_projected(model) else model
    return sum(p.numel() for p in made.parameters())
