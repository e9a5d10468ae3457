"""What the encoders run on: full batches of random tokens, and sentences of SST-2."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer

from variator_kernels.train import data

from ..cases import models
from ..cases.encoder import Batch
from ..cases.models import Architecture
from ..quality import encoding, tasks

SST2 = "sst2"
LONGEST = 512
CALIBRATION_ROWS, CALIBRATION_LENGTH = 96, 128


class Input(NamedTuple):
    """The batches of one call; ``length`` is that of the longest row."""

    name: str
    batch: int
    length: int
    batches: tuple[Batch, ...] = ()
    """Empty: a full batch of random tokens."""


def parse(text: str) -> str:
    """``"8x512"`` or ``"sst2"``, checked; ``ValueError`` otherwise."""
    sizes = text.split("x")
    if text != SST2 and not (len(sizes) == 2 and all(s.isdigit() and int(s) for s in sizes)):
        raise ValueError(f"shape must be ROWSxTOKENS or {SST2}, got {text!r}")
    return text


def made(shape: str, model: Architecture, folder: Path, sentences: int) -> Input:
    """The input of a shape; ``sentences`` of SST-2's dev set, in batches of similar length.

    Raises:
        ValueError, FileNotFoundError: no data, or no tokenizer.
    """
    if shape != SST2:
        batch, length = map(int, shape.split("x"))
        return Input(f"{batch} x {length}", batch, length)
    batches = tuple(_sst2(model, folder, "dev", sentences))
    longest = max(ids.shape[1] for ids, _ in batches)
    return Input("SST-2 sentences", encoding.ROWS, longest, batches)


def calibration(model: Architecture, folder: Path) -> list[Batch]:
    """Rows to take activations' ranges from: sentences of SST-2's training set where the weights
    are pretrained, of other rows than are measured; random tokens of many lengths otherwise."""
    if model.folder:
        found = _sst2(model, folder, "train", CALIBRATION_ROWS)
        rows = (
            (row[m.bool()][None], m[m.bool()][None])
            for ids, mask in found
            for row, m in zip(ids, mask, strict=True)
        )
        return list(rows)
    source = models.generator(7)
    lengths = torch.linspace(8, CALIBRATION_LENGTH, CALIBRATION_ROWS // 4).int().tolist()
    some = [torch.randint(model.config.vocab_size, (1, n), generator=source) for n in lengths]
    return [(ids, torch.ones_like(ids)) for ids in some]


def _sst2(model: Architecture, folder: Path, split: str, count: int) -> Iterator[Batch]:
    """Sentences from all over a split. Weights that are random take MiniLM's tokens: of their
    sentences it is the lengths that matter."""
    task = tasks.TASKS[SST2]
    read = data.read(str(folder / getattr(task, split)), task.text)
    lines = [row.values[task.text[0]] for row in read]
    lines = [lines[i * len(lines) // count] for i in range(min(count, len(lines)))]
    own = model.tokenizer or (None if model.folder else models.minilm())
    if own is None:
        raise ValueError(f"sentences need a tokenizer, {model.name} has none")
    tokenizer = AutoTokenizer.from_pretrained(own, local_files_only=True)
    for batch in encoding.batches(tokenizer, lines, LONGEST):
        ids = batch["input_ids"]
        yield ids if model.folder else ids % model.config.vocab_size, batch["attention_mask"]
