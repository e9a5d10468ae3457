"""When requests are sent: Poisson arrivals in phases, drawn before the run."""

import random
from typing import NamedTuple


class Phase(NamedTuple):
    """``rate``: requests a second."""

    name: str
    seconds: float
    rate: float


class Request(NamedTuple):
    """``at``: seconds from the trace's beginning; ``sentence``: its number."""

    at: float
    sentence: int
    phase: int


def phases(capacity: float, seconds: float, burst: float) -> list[Phase]:
    """The issue's trace: half of ``capacity``, ``burst`` times it, half again."""
    shape = (("half", 0.5), ("burst", burst), ("half again", 0.5))
    return [Phase(name, seconds, share * capacity) for name, share in shape]


def poisson(parts: list[Phase], sentences: int, seed: int = 0) -> list[Request]:
    """Independent arrivals. Sentences come in random order, all of them before one comes again."""
    source = random.Random(seed)
    order: list[int] = []
    found: list[Request] = []
    begin = 0.0
    for number, phase in enumerate(parts):
        at = begin
        while (at := at + source.expovariate(phase.rate)) < begin + phase.seconds:
            if not order:
                order = list(range(sentences))
                source.shuffle(order)
            found.append(Request(at, order.pop(), number))
        begin += phase.seconds
    return found
