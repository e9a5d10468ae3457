"""The sentences, and what the model answers to each at each level: the truth of a run."""

from pathlib import Path
from typing import NamedTuple

import torch

import variator_kernels as vk
from examples.serve.engine import Engine
from examples.serve.prepare import read

TOLERANCE = 1e-3
"""Of a probability. A server's batches have other sizes and paddings: sums are rounded in other
orders."""


class Truth(NamedTuple):
    """``right``: the labels in words; ``given``: by level, label and probability of each."""

    texts: list[str]
    tokens: list[int]
    right: list[str]
    given: dict[str, list[tuple[str, float]]]

    def agrees(self, sentence: int, level: str, label: str, probability: float) -> bool:
        """It is the model's answer at that level. Where two labels are equally likely within the
        tolerance, either is."""
        if level not in self.given:
            return False
        wanted, p = self.given[level][sentence]
        if label != wanted:
            return abs(p - 0.5) <= TOLERANCE and abs(probability - 0.5) <= TOLERANCE
        return abs(probability - p) <= TOLERANCE


@torch.no_grad()
def truth(engine: Engine, data: Path, most: int | None = None) -> Truth:
    """Of the dev sentences, or of the first ``most``; those of the same length run together,
    without padding."""
    rows = read(data / "dev.tsv")[:most]
    encoded = [engine.tokenizer(text)["input_ids"] for text, _ in rows]
    batches = _of_one_length(encoded)
    given: dict[str, list[tuple[str, float]]] = {}
    for name, level in engine.controller.levels.items():
        found: dict[int, tuple[str, float]] = {}
        for batch in batches:
            ids = torch.tensor([encoded[i] for i in batch])
            with vk.use_ratio(engine.model, level):
                best = engine.model(input_ids=ids).logits.softmax(-1).max(-1)
            labels = [engine.labels[i] for i in best.indices.tolist()]
            found |= zip(batch, zip(labels, best.values.tolist(), strict=True), strict=True)
        given[name] = [found[i] for i in range(len(rows))]
    right = [engine.labels[label] for _, label in rows]
    return Truth([text for text, _ in rows], [len(ids) for ids in encoded], right, given)


def _of_one_length(encoded: list[list[int]], most: int = 16) -> list[list[int]]:
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)
    same = by_length.values()
    return [some[i : i + most] for some in same for i in range(0, len(some), most)]
