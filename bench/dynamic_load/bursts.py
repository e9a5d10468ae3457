"""The largest burst that an arm still answers in time."""

from collections.abc import Callable

from ..harness.results import Row
from .generator import Reply
from .summary import quantiles
from .trace import Phase, Request, poisson

STEP, LEAST = 0.1, 0.5
CALM, BURST = 3.0, 15.0
"""Seconds at half of the capacity, then of the burst."""


def largest(
    ask: Callable[[list[Request]], list[Reply]],
    check: Callable[[list[Reply]], str],
    capacity: float,
    sentences: int,
    target: float,
    highest: float,
) -> Row:
    """The largest multiple of the dense capacity, in steps, at which the burst's 99th percentile
    is within the target: by bisection from 0.5 to ``highest``, both tried where it comes to them.
    None where not even 0.5 is; ``bound`` says what was not tried. ``check``: why replies do not
    count."""  # fmt: skip
    least, most = round(LEAST / STEP), round(highest / STEP)
    low, high = least - 1, most + 1
    tried = []
    while high - low > 1:
        middle = (low + high) // 2
        factor = middle * STEP
        parts = [Phase("half", CALM, 0.5 * capacity), Phase("burst", BURST, factor * capacity)]
        replies = ask(poisson(parts, sentences, seed=middle))
        if reason := check(replies):
            return {"status": "failed", "reason": reason}
        found = quantiles([reply for reply in replies if reply.request.phase == 1])
        tried.append({"factor": factor, **found})
        if found["p99"] <= target:
            low = middle
        else:
            high = middle
    bound = f"below {LEAST:g}" if low < least else f"{highest:g} or more" if low == most else ""
    held = None if low < least else round(low * STEP, 6)
    return {"status": "ok", "largest": held, "bound": bound, "tried": tried}
