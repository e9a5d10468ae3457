"""The time of a switch of levels, over ratios and plans, while another thread runs the model."""

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import variator_kernels as vk

from . import internals
from .cases import models
from .harness.clock import quartiles
from .harness.results import Row

RATIOS, LIMIT = (2, 4), 20.0
ROWS, TOKENS, PAUSE = 2, 64, 1e-3


class Tensors(TorchDispatchMode):
    """Counts operations on tensors in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += 1
        return func(*args, **(kwargs or {}))


def measure(name: str, rounds: int) -> list[Row]:
    """One model of the architecture's depth: microseconds of ``set_ratio``, and of a ``use_ratio``
    block, entered and left. A row fails if a level is not the one that was asked for, or if a
    switch runs an operation on tensors."""
    architecture = models.toy(models.architecture(name))
    model = models.encoder(architecture, torch.float32)
    vk.patch(model, 1, RATIOS)
    for parameter in vk.plugin_parameters(model):
        parameter.data.normal_(0, 0.02, generator=models.generator(1))
    levels: list[tuple[Any, tuple[int, ...]]]
    levels = [(k, internals.everywhere(model, k).ratios) for k in (1, *RATIOS)]
    for ratios in (RATIOS, RATIOS[::-1]):
        plan = internals.plan_of(model, ratios)
        levels.append((plan, plan.ratios))
    ids = models.tokens(ROWS, TOKENS, architecture.config.vocab_size)
    vk.warm(model, [level for level, _ in levels], (TOKENS,), (ROWS,))

    def use(level: Any) -> None:
        with vk.use_ratio(model, level):
            pass

    def set_there(level: Any) -> tuple[int, ...]:
        vk.set_ratio(model, level)
        return internals.level(model)

    def used_there(level: Any) -> tuple[int, ...]:
        with vk.use_ratio(model, level):
            return internals.level(model)

    rows = []
    arms: dict[str, tuple[Callable[[Any], None], Callable[[Any], tuple[int, ...]]]] = {
        "set_ratio": (lambda level: vk.set_ratio(model, level), set_there),
        "use_ratio": (use, used_there),
    }
    for arm, (switch, there) in arms.items():
        row: Row = {"case": "switch", "model": name, "arm": arm, "limit": LIMIT}
        row |= {"sites": len(levels[0][1]), "levels": [str(list(ratios)) for _, ratios in levels]}
        wrong = [ratios for level, ratios in levels if there(level) != ratios]
        with Tensors() as tensors:
            for level, _ in levels:
                switch(level)
        samples, forwards = _beside(model, ids, switch, levels, rounds)
        row |= {"tensors": tensors.made, "forwards": forwards}
        if wrong or tensors.made:
            reason = f"{len(wrong)} levels are others, {tensors.made} tensors were made"
            row |= {"status": "failed", "reason": reason}
        else:
            row |= {"status": "ok", "samples": samples, **quartiles(samples)}
        rows.append(row)
    return rows


def _beside(
    model: nn.Module, ids: torch.Tensor, switch: Callable[[Any], None], levels: Any, rounds: int
) -> tuple[list[float], int]:
    """Microseconds of each switch, and how many forwards ran meanwhile in another thread."""
    stop, counted = threading.Event(), [0]

    @torch.no_grad()
    def run() -> None:
        with vk.use_ratio(model, RATIOS[0]):
            while not stop.is_set():
                model(input_ids=ids)
                counted[0] += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not counted[0] and thread.is_alive():
            time.sleep(PAUSE)
        samples = []
        for level, _ in itertools.islice(itertools.cycle(levels), rounds):
            time.sleep(PAUSE)  # without it this thread would hardly let the other run
            start = time.perf_counter()
            switch(level)
            samples.append(1e6 * (time.perf_counter() - start))
    finally:
        stop.set()
        thread.join()
    return samples, counted[0]
