"""The tasks and the plain text: files under one folder."""

from pathlib import Path
from typing import Any, NamedTuple

from variator_kernels.train import data, rows, task


class Task(NamedTuple):
    """A classification task: TSV files with a header, and what their columns mean."""

    name: str
    train: str
    dev: str
    text: tuple[str, ...]
    labels: tuple[str, ...]
    """In the order of their numbers."""
    test: str = ""
    """More rows, with labels, that no setting was chosen by; the file may be missing."""


TASKS = {
    "sst2": Task("sst2", "sst2/train.tsv", "sst2/dev.tsv", ("sentence",), ("negative", "positive"),
                 "sst2/test.tsv"),
    "rte": Task("rte", "rte/train.tsv", "rte/dev.tsv", ("sentence1", "sentence2"),
                ("not_entailment", "entailment")),
}  # fmt: skip
PLAIN_TEXT = ("wikitext2/valid.txt", "wikitext2/test.txt")


def check(folder: Path, which: Task) -> None:
    """``ValueError`` or ``FileNotFoundError`` if a file is not as it should be."""
    for split in ("train", *held_out(folder, which)):
        found = data.read(str(folder / getattr(which, split)), (*which.text, "label"))
        task.class_ids(found, "label", which.labels)


def held_out(folder: Path, which: Task) -> list[str]:
    """``"dev"``, and ``"test"`` if ``folder`` has one."""
    return ["dev", "test"] if which.test and (folder / which.test).is_file() else ["dev"]


def load(
    folder: Path, which: Task, split: str, model: Any, tokenizer: Any, least: int = 0
) -> tuple[rows.Rows, Any]:
    """The rows of ``"train"``, ``"dev"`` or ``"test"``, and what tells a right answer.

    ``least``: rows of fewer tokens are left out.
    """
    read = data.read(str(folder / getattr(which, split)), (*which.text, "label"))
    labels, correct = task.targets(read, "label", which.labels, model, tokenizer)
    made = rows.examples(read, which.text, tokenizer, None, None)
    for row, label in zip(made, labels, strict=True):
        row["labels"] = label
    return rows.Rows([row for row in made if len(row["input_ids"]) >= least]), correct


def plain_text(folder: Path, names: tuple[str, ...] = PLAIN_TEXT) -> list[data.Row]:
    """All paragraphs, headings left out."""
    read = [row for name in names for row in data.read(str(folder / name), (data.TEXT,))]
    return [row for row in read if not row.values[data.TEXT].startswith("=")]
