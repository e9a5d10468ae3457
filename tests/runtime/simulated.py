"""A queue in front of one model, in simulated time, with the real controller."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from variator_kernels import LevelTimes, RatioController

SPEEDS = (1.0, 1.35, 1.6, 1.8)
NAMES = ("1", "2", "4", "8")
A_TOKEN, A_FORWARD = 2e-4, 2e-3
TOKENS = 20
CAPACITY = 1 / (TOKENS * A_TOKEN)
"""Requests a second that the dense level serves in large batches, about."""


def times(names=NAMES, speeds=SPEEDS) -> LevelTimes:
    rows, lengths = (1, 4, 16), (8, 32, 64)
    table = tuple(
        tuple(tuple(cost(b, b * n, speed) for n in lengths) for b in rows) for speed in speeds
    )
    return LevelTimes(names, rows, lengths, table)


def cost(rows: float, tokens: float, speed: float) -> float:
    return A_FORWARD + tokens * A_TOKEN / speed


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Answer(NamedTuple):
    arrived: float
    seconds: float
    level: str


def poisson(rates: list[tuple[float, float]], seed: int = 0) -> list[float]:
    """Arrival times of phases of (seconds, requests a second)."""
    source, found, begin = random.Random(seed), [], 0.0
    for seconds, rate in rates:
        at = begin
        while (at := at + source.expovariate(rate)) < begin + seconds:
            found.append(at)
        begin += seconds
    return found


def serve(
    controller: RatioController,
    clock: Clock,
    arrivals: list[float],
    slow: Callable[[float], float] = lambda now: 1.0,
    asks: Callable[[int], str | None] = lambda number: None,
    full: int = 320,
    fixed: str | None = None,
) -> list[Answer]:
    """Every request gets an answer; one batch at a time, in the order of arrival. ``slow``: how
    much more than the profile says a batch takes. ``fixed``: what really runs."""
    speeds = dict(zip(NAMES, SPEEDS, strict=True))
    coming = deque(enumerate(arrivals))
    waiting: deque = deque()
    answers: list[Answer] = []

    def accept(until: float) -> None:
        while coming and coming[0][1] <= until:
            number, clock.now = coming.popleft()
            waiting.append(controller.arrive(TOKENS, asks(number)))

    while coming or waiting:
        if not waiting:
            accept(max(clock.now, coming[0][1]))
        batch = [waiting.popleft()]
        while waiting and (len(batch) + 1) * TOKENS <= full and waiting[0].level == batch[0].level:
            batch.append(waiting.popleft())
        with controller.batch(batch) as choice:
            tokens = TOKENS * len(batch)
            took = cost(len(batch), tokens, speeds[fixed or choice.name]) * slow(clock.now)
            end = clock.now + took
            accept(end)
            clock.now = end
        answers += [Answer(t.arrived, end - t.arrived, choice.name) for t in batch]
    return answers


def quantile(answers: list[Answer], q: float, begin: float = 0.0, end: float = 1e9) -> float:
    seconds = sorted(a.seconds for a in answers if begin <= a.arrived < end)
    return seconds[min(len(seconds) - 1, int(q * len(seconds)))]
