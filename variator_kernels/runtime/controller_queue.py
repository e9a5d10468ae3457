"""What waits for a model: requests, their tokens, and how fast they come."""

from __future__ import annotations

import math
from collections.abc import Iterable


class Ticket:
    """A request that has arrived. ``level``: the number of the level that it asks for, or None."""

    __slots__ = ("arrived", "level", "tokens")

    def __init__(self, arrived: float, tokens: int, level: int | None) -> None:
        self.arrived = arrived
        self.tokens = tokens
        self.level = level


class Rate:
    """Tokens a second, the past weighted by exp(-age / ``seconds``)."""

    __slots__ = ("at", "seconds", "value")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.value = 0.0
        self.at = -math.inf

    def add(self, now: float, tokens: int) -> None:
        self.value = self.read(now) + tokens / self.seconds
        self.at = max(self.at, now)

    def read(self, now: float) -> float:
        if not self.value:
            return 0.0
        return self.value * math.exp(min(0.0, self.at - now) / self.seconds)


class Load:
    """The tickets of one kind: those that leave the level to the controller, or those that ask for
    one certain level."""

    __slots__ = ("rate", "rows", "tokens")

    def __init__(self, seconds: float) -> None:
        self.rows = 0
        self.tokens = 0
        self.rate = Rate(seconds)


class Waiting:
    """The tickets that wait, in the order of their arrival."""

    def __init__(self, levels: int, seconds: float) -> None:
        """``seconds``: over which arrival rates are averaged."""
        self.tickets: dict[Ticket, None] = {}
        self.free = Load(seconds)
        """Of the tickets that ask for no level."""
        self.fixed = [Load(seconds) for _ in range(levels)]
        self.length = 0.0
        """Tokens a request, averaged over the last ones."""

    def arrive(self, ticket: Ticket) -> None:
        self.tickets[ticket] = None
        load = self.free if ticket.level is None else self.fixed[ticket.level]
        load.rows += 1
        load.tokens += ticket.tokens
        load.rate.add(ticket.arrived, ticket.tokens)
        share = 0.02 if self.length else 1.0
        self.length += share * (ticket.tokens - self.length)

    def leave(self, tickets: Iterable[Ticket]) -> None:
        """Raises KeyError: one does not wait."""
        for ticket in tickets:
            del self.tickets[ticket]
            load = self.free if ticket.level is None else self.fixed[ticket.level]
            load.rows -= 1
            load.tokens -= ticket.tokens

    @property
    def rows(self) -> int:
        return len(self.tickets)

    @property
    def tokens(self) -> int:
        return self.free.tokens + sum(load.tokens for load in self.fixed)

    def oldest(self) -> Ticket | None:
        return next(iter(self.tickets), None)

    def youngest(self) -> Ticket | None:
        return next(reversed(self.tickets), None)
