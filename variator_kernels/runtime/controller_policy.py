"""Which level the next batch gets: a pure function of what has come, what runs, and the time.

No clock is read and no model is run here, so that a simulation and a test go the very way of a
server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .controller_queue import Ticket, Waiting
from .controller_times import LevelTimes


class Settings(NamedTuple):
    """``target``: seconds from arrival to answer."""

    target: float
    batch_tokens: int
    """Of a full batch: the waiting requests are counted in such ones."""
    margin: float = 0.8
    """Of the target: what may be predicted."""
    calm: float = 0.5
    """Of the target: what may be predicted at a less compressed level to go down to it."""
    utilisation: float = 1.0
    """Of a level's throughput: what may arrive."""
    calm_utilisation: float = 0.9
    hold: float = 1.0
    """Seconds for which a less compressed level must do before it is taken."""
    rate_seconds: float = 2.0
    """Over which the arrival rate is averaged."""


class Batch:
    """One that runs. ``level``: its number; ``predicted``: seconds, had it the machine alone."""

    __slots__ = ("began", "level", "oldest", "predicted", "reason", "rows", "tokens", "youngest")

    def __init__(self, began: float, tickets: Sequence[Ticket]) -> None:
        self.began = began
        self.rows = len(tickets)
        self.tokens = sum(ticket.tokens for ticket in tickets)
        arrivals = [ticket.arrived for ticket in tickets]
        self.oldest, self.youngest = min(arrivals), max(arrivals)
        self.level = 0
        self.predicted = 0.0
        self.reason = ""


class Prediction(NamedTuple):
    """Seconds from arrival to answer: ``own`` of the batch's oldest request, ``oldest`` and
    ``youngest`` of those that wait, ``coming`` of one that comes now (0: none waits). ``share``:
    what arrives, of the level's throughput."""

    level: int
    own: float
    oldest: float
    youngest: float
    coming: float
    share: float

    def seconds(self) -> float:
        return max(self.own, self.oldest, self.youngest, self.coming)

    def within(self, seconds: float, share: float) -> bool:
        return self.seconds() <= seconds and self.share <= share

    def __str__(self) -> str:
        share = f"{100 * self.share:.0f} %"
        return f"{self.seconds():.3f} s are predicted, {share} of its throughput arrives"


class Policy:
    """Levels are numbers, 0 the least compressed. ``level`` is the one of the last free batch."""

    SLOWEST, FASTEST, SHARE = 4.0, 0.25, 0.05

    def __init__(self, times: LevelTimes, settings: Settings) -> None:
        self.times = times
        self.settings = settings
        self.allowed = list(range(len(times.names)))
        """Numbers of the levels that may be chosen, ascending."""
        self.level = 0
        self.waiting = Waiting(len(times.names), settings.rate_seconds)
        self.slowdown = 1.0
        """What batches take, over what was measured beforehand: the machine does other work too."""
        self.running: dict[Batch, None] = {}
        self._ended = -1e300
        self._calm_since: float | None = None
        self._fulls: dict[int, tuple[int, float]] = {}
        self._calm_level = 0

    def begin(self, now: float, tickets: Sequence[Ticket], fixed: int | None) -> Batch:
        """A batch of tickets, which no longer wait; ``fixed``: the level that they ask for. If it
        is allowed no more, they get the next less compressed one that is."""
        self.waiting.leave(tickets)
        batch = Batch(now, tickets)
        if fixed is None:
            self._choose(now, batch)
            batch.level = self.level
        else:
            batch.level = self.nearest(fixed)
        batch.predicted = self.times.predict(batch.level, batch.rows, batch.tokens)
        self.running[batch] = None
        return batch

    def end(self, now: float, batch: Batch, learn: bool = True) -> None:
        """It has ended; ``learn``: as it should."""
        del self.running[batch]
        if learn and not self.running:
            # From the end of the one before, or from when the last request of it had come: what
            # the server does between batches counts.
            took = now - max(min(self._ended, batch.began), batch.youngest)
            ratio = took / batch.predicted
            ratio = min(max(ratio, self.FASTEST), self.SLOWEST)
            self.slowdown += self.SHARE * (ratio - self.slowdown)
        self._ended = now

    def nearest(self, level: int) -> int:
        """A level that is allowed: itself, or the last one before it, or else the first."""
        return max((i for i in self.allowed if i <= level), default=self.allowed[0])

    def throughput(self, level: int) -> float:
        """Tokens a second in full batches, by what was measured beforehand."""
        full = self.settings.batch_tokens
        return full / self._full(level)

    def _full(self, level: int) -> float:
        """Seconds of a full batch of requests of the usual length."""
        length = round(self.waiting.length) or 1
        known = self._fulls.get(level)
        if known is None or known[0] != length:
            full = self.settings.batch_tokens
            seconds = self.times.predict(level, max(full / length, 1.0), full)
            known = self._fulls[level] = length, seconds
        return known[1]

    def _drain(self, level: int, rows: int, tokens: int) -> float:
        """Seconds until so many have been worked off, in full batches and a rest."""
        if not rows:
            return 0.0
        full = self.settings.batch_tokens
        whole, rest = divmod(tokens, full)
        seconds = whole * self._full(level) if whole else 0.0
        return seconds + (self.times.predict(level, rows * rest / tokens, rest) if rest else 0.0)

    def _outlook(self, now: float, batch: Batch) -> _Outlook:
        waiting, slow = self.waiting, self.slowdown
        running = sum(max(0.0, b.began + b.predicted * slow - now) for b in self.running)
        fixed_seconds = fixed_share = 0.0
        for level, load in enumerate(waiting.fixed):
            if load.rate.value:
                runs = self.nearest(level)
                fixed_seconds += self._drain(runs, load.rows, load.tokens)
                fixed_share += load.rate.read(now) / self.throughput(runs)
        rate = waiting.free.rate.read(now)
        oldest, youngest = waiting.oldest(), waiting.youngest()
        return _Outlook(
            now - batch.oldest,
            None if youngest is None else now - youngest.arrived,
            None if oldest is None else now - oldest.arrived,
            running,
            fixed_seconds,
            fixed_share,
            rate,
        )

    def predicted(self, level: int, batch: Batch, outlook: _Outlook) -> Prediction:
        """What would become of the batch, and of what waits, at a level from now on."""
        slow = self.slowdown
        own = outlook.running + slow * self.times.predict(level, batch.rows, batch.tokens)
        oldest = youngest = coming = 0.0
        if outlook.youngest is not None and outlook.oldest is not None:
            free = self.waiting.free
            rest = self._drain(level, free.rows, free.tokens) + outlook.fixed_seconds
            coming = own + slow * rest
            youngest = outlook.youngest + coming
            oldest = outlook.oldest + own + slow * min(rest, self._full(level))
        share = slow * (outlook.rate / self.throughput(level) + outlook.fixed_share)
        return Prediction(level, outlook.age + own, oldest, youngest, coming, share)

    def _choose(self, now: float, batch: Batch) -> None:
        """Up at once, down when less compression has done for a while."""
        s, outlook = self.settings, self._outlook(now, batch)
        held = self.level if self.level in self.allowed else -1
        tried: list[Prediction] = []
        needed, lost = None, dict[str, Any]()
        for level in self.allowed:
            made = self.predicted(level, batch, outlook)
            tried.append(made)
            if made.within(s.margin * s.target, s.utilisation):
                needed = level
                break
        if needed is None:
            lost = self._lost(tried)
            needed = self._least_bad(tried, lost)
        if needed > held:
            self.level, self._calm_since = needed, None
            batch.reason = f"at level {self.times.names[tried[0].level]} {tried[0]}"
            return
        calm = held
        for level in self.allowed[self.allowed.index(needed) : self.allowed.index(held)]:
            made = tried[-1] if tried[-1].level == level else self.predicted(level, batch, outlook)
            if made._replace(**lost).within(s.calm * s.target, s.calm_utilisation):
                calm = level
                break
        self._go_down(now, held, calm, batch)

    def _lost(self, tried: list[Prediction]) -> dict[str, Any]:
        """The requests that are late at every level, which do not count: compressing more for them
        would only cost the others their quality."""
        limit = self.settings.margin * self.settings.target
        names = ("own", "oldest", "youngest")
        return {n: 0.0 for n in names if all(getattr(made, n) > limit for made in tried)}

    def _least_bad(self, tried: list[Prediction], lost: dict[str, Any]) -> int:
        """No level does everything. The queue counts by what comes behind it now."""
        limit = self.settings.margin * self.settings.target
        for made in tried:
            if made._replace(**lost).within(limit, self.settings.utilisation):
                return made.level
        return min(tried, key=Prediction.seconds).level

    def _go_down(self, now: float, held: int, calm: int, batch: Batch) -> None:
        """To ``calm``, the least compressed level that would do, if it has been so for long."""
        if calm == held:
            self._calm_since = None
            return
        # A pause before this batch, in which nothing waited or ran, counts; a long one is enough.
        paused = batch.oldest > self._ended and not self.running
        since = self._ended if paused else now
        if self._calm_since is None or now - since >= self.settings.hold:
            self._calm_since, self._calm_level = since, calm
        self._calm_level = max(self._calm_level, calm)
        if now - self._calm_since >= self.settings.hold:
            self.level, self._calm_since = self._calm_level, None
            batch.reason = f"it has done for {self.settings.hold:g} s"


class _Outlook(NamedTuple):
    """Ages in seconds, of the batch's oldest request and of those that wait (None: none does)."""

    age: float
    youngest: float | None
    oldest: float | None
    running: float
    """Seconds until what runs has ended."""
    fixed_seconds: float
    """Of the waiting requests that ask for a certain level,"""
    fixed_share: float
    """and the share of a second that a second's arrivals of them take."""
    rate: float
    """Tokens a second of the others."""
