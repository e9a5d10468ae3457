"""Minutes at the burst's load: nothing may be lost, and memory may not grow."""

import threading
from collections.abc import Callable

import numpy as np

from ..harness.results import Row
from .answers import Truth
from .generator import Reply
from .server import Server
from .summary import of, wrong
from .trace import Phase, Request, poisson

EVERY, GROWTH, LEAST = 2.0, 0.02, 60.0
"""Seconds between two looks at the memory, how much it may grow, and the seconds below which a
process is still warming up and growth says nothing."""


def soak(
    server: Server, ask: Callable[[list[Request]], list[Reply]], truth: Truth, dense: str,
    rate: float, seconds: float,
) -> Row:  # fmt: skip
    """Memory is compared between the second tenth of the time and the last one: before, buffers
    and connections are made."""
    sizes: list[int] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(EVERY if seconds > LEAST else seconds / 40):
            sizes.append(server.memory())

    watching = threading.Thread(target=look)
    watching.start()
    try:
        replies = ask(poisson([Phase("burst", seconds, rate)], len(truth.texts)))
    finally:
        stop.set()
        watching.join()
    made: Row = {"case": "soak", "arm": "controlled", "rate": rate, "seconds": seconds}
    if reason := wrong(replies, truth, None):
        return made | {"status": "failed", "reason": reason}
    tenth = max(1, len(sizes) // 10)
    early, last = np.median(sizes[tenth : 2 * tenth] or sizes), np.median(sizes[-tenth:])
    growth = float(last / early - 1)
    made |= {"memory": sizes, "growth": growth, **of(replies, truth, dense)}
    if growth > GROWTH and seconds > LEAST:
        return made | {"status": "failed", "reason": f"memory grew by {100 * growth:.1f} %"}
    return made | {"status": "ok"}
