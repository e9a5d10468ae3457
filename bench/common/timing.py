"""Interleaved timing: every arm once a round, so that drift of the machine hits all alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)


def interleave(
    calls: Mapping[Key, Callable[[], Any]],
    rounds: int,
    advance: Callable[[], None] = lambda: None,
    settle: bool = False,
) -> tuple[dict[Key, list[float]], dict[Key, Any]]:
    """Seconds of each call in each round, and each call's last output.

    The order changes from round to round, from a fixed seed: no arm always follows the same one.
    ``settle`` calls each arm once untimed right before each timed call, so that an arm pays neither
    for what the arm before it left in the caches nor for memory it gave back.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    last: dict[Key, Any] = {}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            shuffle(order)
            for key in order:
                if settle:
                    calls[key]()
                start = time.perf_counter()
                out = calls[key]()
                seconds[key].append(time.perf_counter() - start)
                if turn == rounds - 1:
                    last[key] = out
                del out
                advance()
    finally:
        gc.enable()
    return seconds, last


def quartiles(samples: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(samples) == 1:
        return dict.fromkeys(("q1", "median", "q3"), samples[0])
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Speed-up by round (both arms of one round), then its quartiles."""
    return quartiles([a / b for a, b in zip(slow, fast, strict=True)])


def median_of(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call after one warm-up; for choosing between variants only."""
    call()
    return statistics.median(interleave({"": call}, repeats)[0][""])
