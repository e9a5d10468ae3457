"""Time to first token and of the next ones, bytes of caches, peak memory of a prompt."""

import argparse
import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

import variator_kernels as vk

from .. import internals
from ..cases import models
from ..harness import allocations
from ..harness.clock import Wall, quartiles, ratio
from ..harness.results import Row
from . import setup
from .levels import Level


class Run:
    """A level on a model that several share."""

    def __init__(self, model: Any, level: Level, steps: int = 0) -> None:
        self.model, self.level, self.steps = model, level, steps
        self.prefilled: Any = None
        self.cache: Any = None
        """Behind the last :meth:`continuation` of one row."""

    def begin(self) -> None:
        """Make the model run this level."""
        if self.level.where:
            vk.set_ratio(self.model, self.level.ratio(self.model.config.num_hidden_layers))

    def bound(self, length: int) -> float:
        """The speed-up of a prompt if time were multiply-adds."""
        ratio = self.level.ratio(self.model.config.num_hidden_layers)
        return 1 / vk.flops.count(self.model, 1, length, ratio).fraction_left

    @torch.no_grad()
    def first(self, ids: Tensor) -> Any:
        """A prompt ``[1, n]``: the first token ``[1, 1]``, and the cache."""
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def copied(self, rows: int) -> None:
        """The prompt's cache for so many rows, untimed."""
        self.begin()
        self.cache = copy.deepcopy(self.prefilled[1])
        if rows > 1:
            self.cache.batch_repeat_interleave(rows)

    @torch.no_grad()
    def continuation(self, rows: int) -> None:
        """The next tokens behind :meth:`copied`, greedily."""
        token = self.prefilled[0].expand(rows, 1)
        for _ in range(self.steps):
            out = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        if rows > 1:
            self.cache = None  # or the caches of all levels were there at once


def counted(runs: dict[Level, Run], rows: dict[Level, Row], prompt: Tensor) -> None:
    """What needs no clock: the bytes of a prompt's cache, and the bound of multiply-adds."""
    for level, run in runs.items():
        run.begin()
        run.prefilled = run.first(prompt)  # warms up, too
        row = rows[level]
        row["prompt_bytes"] = nbytes(run.prefilled[1])
        row["prompt_share"] = row["prompt_bytes"] / rows[Level()]["prompt_bytes"]
        row["bound"] = run.bound(prompt.shape[1]) if level.where else None


def timed(runs: dict[Level, Run], rows: dict[Level, Row], prompt: Tensor,
          args: argparse.Namespace, step: Any) -> None:  # fmt: skip
    """First token, next tokens by batch, and the cache's bytes; behind :func:`counted`."""

    def measure(name: str, calls: dict[Level, Any], before: Any, share: int = 1) -> None:
        seconds, _ = Wall().interleave(calls, args.rounds, partial(step, name), before=before)
        for level, run in runs.items():
            taken = [s / share for s in seconds[level]]
            over = ratio(seconds[Level()], seconds[level])
            rows[level][name] = {**quartiles(taken), "samples": taken, "speedup": over}
            if name == "batch 1":
                rows[level]["cache_bytes"] = nbytes(run.cache)

    firsts = {level: partial(run.first, prompt) for level, run in runs.items()}
    measure("first", firsts, lambda level: runs[level].begin())
    for size in args.batches:
        calls = {level: partial(run.continuation, size) for level, run in runs.items()}
        measure(
            f"batch {size}", calls, lambda level, size=size: runs[level].copied(size), args.tokens
        )
    for level in runs:
        rows[level]["cache_share"] = rows[level]["cache_bytes"] / rows[Level()]["cache_bytes"]


def nbytes(cache: Any) -> int:
    """Of all the tensors that a cache holds, whatever its class."""
    found: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for part in value.values():
                walk(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                walk(part)
        elif type(value).__module__.startswith(("transformers.cache", "variator_kernels")):
            walk(vars(value))

    walk(cache)
    return sum(found.values())


def prefill_memory(cell: Row) -> Row:
    """Of a prompt, in this process: how much it grows, beside the model and packed weights."""
    torch.set_num_threads(cell["threads"])
    level = Level(*cell["level"])
    model = setup.load(setup.architecture(cell["model"]), models.DTYPES[cell["dtype"]])
    if level.where:
        model = setup.patched(model, (level.k,), level.window or 0)
    run, ids = Run(model, level), models.tokens(1, cell["tokens"], model.config.vocab_size)
    run.begin()
    run.first(ids)  # packs weights in every form that so many rows want, starts threads
    growth = allocations.grown(lambda: run.first(ids))
    packed = internals.packed_bytes(model)
    return {"status": "ok", "reason": "", "peak_bytes": growth, "packed_bytes": packed}
