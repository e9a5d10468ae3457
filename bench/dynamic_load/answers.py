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
    """Of the dev sentences, or of the first ``most``; each runs by itself, without padding."""
    rows = read(data / "dev.tsv")[:most]
    encoded = [engine.tokenizer(text)["input_ids"] for text, _ in rows]
    right = [engine.labels[label] for _, label in rows]
    given: dict[str, list[tuple[str, float]]] = {}
    for name, level in engine.controller.levels.items():
        with vk.use_ratio(engine.model, level):
            logits = [engine.model(input_ids=torch.tensor([ids])).logits[0] for ids in encoded]
        best = [one.softmax(-1).max(-1) for one in logits]
        given[name] = [(engine.labels[int(b.indices)], float(b.values)) for b in best]
    return Truth([text for text, _ in rows], [len(ids) for ids in encoded], right, given)
