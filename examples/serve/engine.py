"""The model and its controller: text to tokens, tokens to answers. Knows no server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import variator_kernels as vk

from .settings import Settings

ROWS, LENGTHS = (1, 2, 4, 8, 16), (8, 16, 32, 64)


class Job(NamedTuple):
    """A request that was accepted."""

    ids: list[int]
    ticket: Any


class Answer(NamedTuple):
    label: str
    probability: float
    level: str


class Engine:
    """Ready when it is made: weights are packed, every level has run."""

    def __init__(self, settings: Settings, registry: Any = None, name: str = "sst2") -> None:
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(
            settings.model, local_files_only=True
        ).eval()
        levels = [int(word) for word in settings.levels.split(",")]
        stored = json.loads((Path(settings.plugins) / "plugins.json").read_text())
        vk.patch(model, 1, stored["placements"], placements=tuple(stored["placements"]),
                 optimize="encoder")  # fmt: skip
        vk.load_plugins(model, settings.plugins)
        self.model = vk.freeze(model)
        self.labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        vk.warm(model, levels, (LENGTHS[0], settings.most_tokens), (1, 2, 8))
        self.controller = vk.RatioController(
            model, target_seconds=settings.target, levels=levels, profile=settings.profile,
            max_ratio=settings.max_ratio or None, batch_tokens=settings.batch_tokens,
            rows=ROWS, lengths=LENGTHS, registry=registry, name=name,
        )  # fmt: skip

    def accept(self, text: str, ratio: Any = None) -> Job:
        """A request that has just arrived.

        Raises:
            ValueError: the text has no token or too many, or there is no such level.
            OverflowError: too many wait already.
        """
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        most, special = self.settings.most_tokens, self.tokenizer.num_special_tokens_to_add()
        if len(ids) <= special:
            raise ValueError("text must hold a word")
        if len(ids) > most:
            raise ValueError(f"text must have at most {most} tokens, got {len(ids)}")
        if self.controller.status()["waiting_requests"] >= self.settings.most_waiting:
            raise OverflowError(f"{self.settings.most_waiting} requests wait: come back later")
        return Job(ids, self.controller.arrive(len(ids), ratio))

    def forward(self, jobs: Sequence[Job]) -> list[Answer]:
        """One batch at the level that the controller picks; blocks."""
        inputs = self.tokenizer.pad({"input_ids": [job.ids for job in jobs]}, return_tensors="pt")
        tickets = [job.ticket for job in jobs]
        with torch.no_grad(), self.controller.batch(tickets) as choice:
            best = self.model(**inputs).logits.float().softmax(-1).max(-1)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [Answer(self.labels[i], p, choice.name) for p, i in pairs]


def cut(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """Batches of jobs that ask for the same level, sorted by length, of at most ``most`` tokens
    with padding (a longer job is alone)."""
    batches: list[list[Job]] = []
    room: list[Job] = []
    ordered = sorted(jobs, key=lambda job: (str(job.ticket.level), len(job.ids)))
    for job in ordered:
        # Sorted: the last one is the longest, all are padded to it.
        full = (len(room) + 1) * len(job.ids) > most
        if room and (full or job.ticket.level != room[-1].ticket.level):
            batches.append(room)
            room = []
        room.append(job)
    return [*batches, room] if room else batches
