"""The time of a switch of levels, and of a controller's batch, while another thread runs the
model."""

import functools
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
BATCH, BEHIND = 16, 100
"""Requests of a controller's batch, and those that wait behind it."""


class Operations(TorchDispatchMode):
    """Keeps the operations on tensors in this thread, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def plugged(name: str, ratio: int, ratios: tuple[int, ...], layers: int = 0) -> Any:
    """A small model of the architecture, with plugins, and so many layers; 0: as it has."""
    architecture = models.toy(models.architecture(name))
    architecture.config.num_hidden_layers = layers or architecture.config.num_hidden_layers
    model = vk.patch(models.encoder(architecture, torch.float32), ratio, ratios)
    models.fill(model)
    return model


def measure(name: str, rounds: int) -> list[Row]:
    """One model of the architecture's depth: microseconds of ``set_ratio``, and of a ``use_ratio``
    block, entered and left. A row fails if a level is not the one that was asked for, or if a
    switch runs an operation on tensors."""
    model = plugged(name, 1, RATIOS)
    levels: list[tuple[Any, tuple[int, ...]]]
    levels = [(k, internals.state(model).everywhere(k).ratios) for k in (1, *RATIOS)]
    for ratios in (RATIOS, RATIOS[::-1]):
        plan = internals.plan_of(model, ratios)
        levels.append((plan, plan.ratios))
    ids = models.tokens(ROWS, TOKENS, model.config.vocab_size)
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
        with Operations() as seen:
            for level, _ in levels:
                switch(level)
        tensors = len(seen.found)
        turns = itertools.cycle([level for level, _ in levels])
        samples, forwards = _beside(model, ids, switch, functools.partial(next, turns), rounds)
        row |= {"tensors": tensors, "forwards": forwards}
        if wrong or tensors:
            reason = f"{len(wrong)} levels are others, {tensors} tensors were made"
            row |= {"status": "failed", "reason": reason}
        else:
            row |= {"status": "ok", "samples": samples, **quartiles(samples)}
        rows.append(row)
    return [*rows, _controlled(name, model, ids, rounds)]


def _controlled(name: str, model: nn.Module, ids: torch.Tensor, rounds: int) -> Row:
    """A controller's part of a batch, with others waiting: the choice, the switch and back."""
    levels = (1, *RATIOS)
    times = vk.LevelTimes(
        tuple(map(str, levels)), (1, 16), (8, 64), tuple(((1e-3 / k, 0.1 / k),) * 2 for k in levels)
    )
    controller = vk.RatioController(model, target_seconds=1.0, levels=levels, profile=times)
    for _ in range(BEHIND):
        controller.arrive(20)

    def run(tickets: Any) -> None:
        with controller.batch(tickets):
            pass

    def arrive() -> Any:
        return [controller.arrive(20) for _ in range(BATCH)]

    samples, forwards = _beside(model, ids, run, arrive, rounds)
    row: Row = {"case": "controller", "model": name, "arm": "controller's batch", "limit": 50.0}
    row |= {"rows": BATCH, "waiting": BEHIND, "forwards": forwards}
    status = controller.status()
    if status["waiting_requests"] != BEHIND or status["running_batches"]:
        return row | {"status": "failed", "reason": f"the controller's books are wrong: {status}"}
    return row | {"status": "ok", "samples": samples, **quartiles(samples)}


def _beside(
    model: nn.Module,
    ids: torch.Tensor,
    switch: Callable[[Any], None],
    prepare: Callable[[], Any],
    rounds: int,
) -> tuple[list[float], int]:
    """Microseconds of ``switch`` on what ``prepare`` gives, and how many forwards ran meanwhile in
    another thread."""  # fmt: skip
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
        for _ in range(rounds):
            given = prepare()
            time.sleep(PAUSE)  # without it this thread would hardly let the other run
            start = time.perf_counter()
            switch(given)
            samples.append(1e6 * (time.perf_counter() - start))
    finally:
        stop.set()
        thread.join()
    return samples, counted[0]
