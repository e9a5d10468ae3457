"""The same queue without a server, for many machines: measured service times in, latencies out.

Machines have a controller each, as replicas do; a request goes to the one of two machines, drawn at
random, that has fewer tokens to do. Sentences have the lengths of the real ones.
"""

import bisect
import functools
import heapq
import random
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .. import internals
from ..harness.results import Row
from .trace import Phase, phases, poisson

TAKEN = 2
"""Batches that are taken at once, sorted by length and cut, as the server does."""


class World(NamedTuple):
    """``times``: of the levels; ``slowdown``: what batches really take over these, measured on the
    server; ``tokens``: of each sentence; ``target``: seconds; ``full``: tokens of a batch."""

    times: internals.LevelTimes
    slowdown: float
    tokens: list[int]
    target: float
    full: int


class _Machine:
    """A queue, the batches that were taken from it, and a policy."""

    def __init__(self, world: World, fixed: int | None) -> None:
        settings = internals.ControllerSettings(world.target, world.full)
        self.world, self.fixed = world, fixed
        self.policy = internals.ControllerPolicy(world.times, settings)
        self.waiting: deque[internals.Ticket] = deque()
        self.taken: deque[list[internals.Ticket]] = deque()
        self.running: internals.RunningBatch | None = None
        self.batch: list[internals.Ticket] = []

    def load(self) -> int:
        return self.policy.waiting.tokens + (self.running.tokens if self.running else 0)

    def arrive(self, now: float, tokens: int) -> None:
        ticket = internals.Ticket(now, tokens, self.fixed)
        self.policy.waiting.arrive(ticket)
        self.waiting.append(ticket)

    def start(self, now: float) -> float | None:
        """When the batch that begins now will end; None: nothing waits."""
        if not self.taken:
            self._take()
        if not self.taken:
            return None
        self.batch = self.taken.popleft()
        self.running = self.policy.begin(now, self.batch, self.fixed)
        longest = max(ticket.tokens for ticket in self.batch)
        rows = len(self.batch)
        seconds = self.world.times.predict(self.running.level, rows, rows * longest)
        return now + seconds * self.world.slowdown

    def end(self, now: float) -> list[tuple[float, float, int]]:
        """Arrival, seconds and level of each request of the batch that ended."""
        assert self.running is not None
        level = self.running.level
        self.policy.end(now, self.running)
        self.running = None
        return [(ticket.arrived, now - ticket.arrived, level) for ticket in self.batch]

    def _take(self) -> None:
        some: list[internals.Ticket] = []
        tokens = 0
        while self.waiting and tokens < TAKEN * self.world.full:
            some.append(self.waiting.popleft())
            tokens += some[-1].tokens
        some.sort(key=lambda ticket: ticket.tokens)
        batch: list[internals.Ticket] = []
        for ticket in some:
            if batch and (len(batch) + 1) * ticket.tokens > self.world.full:
                self.taken.append(batch)
                batch = []
            batch.append(ticket)
        if batch:
            self.taken.append(batch)


def simulate(
    world: World, machines: int, parts: list[Phase], fixed: int | None, seed: int = 0
) -> list[tuple[float, float, int]]:
    """Arrival, seconds and level of every request; ``fixed``: the only level, None: controlled."""
    trace = poisson(parts, len(world.tokens), seed)
    fleet = [_Machine(world, fixed) for _ in range(machines)]
    ends: list[tuple[float, int]] = []
    found: list[tuple[float, float, int]] = []
    choose = random.Random(seed)

    def finish(until: float) -> None:
        while ends and ends[0][0] <= until:
            now, number = heapq.heappop(ends)
            found.extend(fleet[number].end(now))
            begin(number, now)

    def begin(number: int, now: float) -> None:
        end = fleet[number].start(now)
        if end is not None:
            heapq.heappush(ends, (end, number))

    for request in trace:
        finish(request.at)
        # The less loaded of two at random is nearly as good as the least of all, and cheap.
        some = {choose.randrange(machines) for _ in range(2)}
        number = min(some, key=lambda i: fleet[i].load())
        fleet[number].arrive(request.at, world.tokens[request.sentence])
        if fleet[number].running is None:
            begin(number, request.at)
    finish(float("inf"))
    return found


def holds(found: list[tuple[float, float, int]], target: float) -> bool:
    return float(np.quantile([seconds for _, seconds, _ in found], 0.99)) <= target


def fewest(world: World, parts: list[Phase], fixed: int | None, most: int) -> Row:
    """The fewest machines, at most ``most``, on which the 99th percentile of a trace is within the
    target, and the share of each level there."""
    on = functools.cache(lambda machines: simulate(world, machines, parts, fixed))
    few = range(1, most + 1)
    place = bisect.bisect_left(few, True, key=lambda machines: holds(on(machines), world.target))
    if place == most:
        return {"status": "failed", "reason": f"more than {most} machines are needed"}
    best = on(few[place])
    levels = [level for _, _, level in best]
    shares = {n: levels.count(i) / len(levels) for i, n in enumerate(world.times.names)}
    p99 = float(np.quantile([s for _, s, _ in best], 0.99))
    return {"status": "ok", "machines": few[place], "p99": p99, "levels": shares}


def rows(world: World, capacity: float, sizes: Sequence[int], seconds: float) -> list[Row]:
    """For loads whose average ``sizes`` dense machines serve at 60 %, with a burst of 1.3 times
    what they can serve: how many machines each arm needs. ``capacity``: of one dense machine."""
    names = world.times.names
    arms: list[tuple[str, int | None]] = [
        *((f"k={name}" if i else "dense", i) for i, name in enumerate(names)),
        ("controlled", None),
    ]
    made = []
    for size in sizes:
        parts = phases(size * capacity, seconds, 1.3)
        for arm, fixed in arms:
            row = {"case": "simulation", "arm": arm, "load": size}
            made.append(row | fewest(world, parts, fixed, 3 * size))
    return made
