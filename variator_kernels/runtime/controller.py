"""A controller that picks the level of each batch, so that answers come in time."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .. import checks
from .controller_arguments import highest_ratios, named, positive
from .controller_measure import measure
from .controller_metrics import Metrics
from .controller_policy import Policy, Settings
from .controller_queue import Ticket
from .controller_times import LevelTimes
from .find_states import found
from .levels import use_ratio
from .warming import Inputs

log = logging.getLogger("variator_kernels.controller")


class Choice(NamedTuple):
    """The level of one batch."""

    name: str
    """As the controller calls it,"""
    ratio: Any
    """and what :func:`use_ratio` takes."""
    predicted_seconds: float
    """Of this batch by itself."""


class RatioController:
    """Picks the least compressed level at which requests are answered in time.

    A server says when a request arrives, and runs each batch inside :meth:`batch`::

        controller = vk.RatioController(model, target_seconds=0.1, levels=(1, 2, 4))
        ticket = controller.arrive(tokens=23)  # as soon as a request is there
        ...
        with controller.batch(tickets) as choice:  # in the thread that runs the model
            output = model(**inputs)

    For each batch it predicts, for every level, when the batch's oldest request and the requests
    that wait behind it would be answered: what runs now, the batch, and the queue cut into full
    batches, by times that were measured beforehand and corrected by those that batches really took.
    It takes the least compressed level that keeps ``margin`` of the target and whose throughput is
    above the arrival rate: a more compressed one at once, a less compressed one when it would have
    done, with more to spare, for ``hold_seconds``. A request that is late at every level does not
    count; a queue counts by what comes behind it.

    It may be used by several threads and by tasks of an event loop; the level of a batch holds in
    the thread or task that is inside :meth:`batch`, as :func:`use_ratio` says. What it does
    depends on its calls and the clock alone.

    Args:
        model: patched, in evaluation mode.
        target_seconds: from a request's arrival to its answer.
        levels: from the least compressed to the most: ratios, mappings and plans as
            :func:`set_ratio` takes them, or a mapping of names to these. Ratios are called by
            their number, ``"4"``; others need names. Default: 1 and every ratio with plugins.
        profile: a :class:`LevelTimes` with these levels; or a file, which is read if it is there
            and otherwise written; or None to measure now (seconds, see ``rows`` and ``lengths``).
        max_ratio: no level with a ratio above this is used (:attr:`max_ratio` can be set later).
        batch_tokens: of a full batch, as the server cuts them. Default 1024.
        margin: of the target, how much may be predicted.
        hold_seconds: for how long less compression must have done before it is taken.
        rate_seconds: over which the arrival rate is averaged.
        rows, lengths, inputs: for measuring, as :func:`warm` takes them.
        registry: a ``prometheus_client.CollectorRegistry`` for metrics, named ``variator_...``.
        name: of this controller, in log lines and metrics.
        clock: seconds; monotonic.

    Raises:
        ValueError: an argument does not fit, the model is not patched or lacks plugins for a
            level, or the profile lacks one. ImportError: ``registry`` is given and
            ``prometheus_client`` is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_seconds: float,
        levels: Iterable[Any] | Mapping[str, Any] | None = None,
        profile: LevelTimes | str | os.PathLike[str] | None = None,
        max_ratio: int | None = None,
        batch_tokens: int = 1024,
        margin: float = 0.8,
        hold_seconds: float = 1.0,
        rate_seconds: float = 2.0,
        rows: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        inputs: Inputs | None = None,
        registry: Any = None,
        name: str = "model",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        target = positive(target_seconds, "target_seconds")
        self.levels = named(levels, sorted({1, *(k for s in found(model) for k in s.ratios)}))
        """The levels by their names, from the least compressed to the most."""
        self._names = tuple(self.levels)
        self._highest = highest_ratios(model, self.levels)
        settings = Settings(
            target, checks.integer(batch_tokens, "batch_tokens", 1),
            positive(margin, "margin", most=1.0), hold=positive(hold_seconds, "hold_seconds"),
            rate_seconds=positive(rate_seconds, "rate_seconds"),
        )  # fmt: skip
        self.model = model
        self.name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._max_ratio: int | None = None
        sizes: dict[str, Any] = {"rows": rows, "lengths": lengths, "inputs": inputs}
        given = {name: value for name, value in sizes.items() if value is not None}
        given["most_tokens"] = 2 * settings.batch_tokens
        self.times = self._profile(profile, given)
        """What was measured beforehand."""
        self._policy = Policy(self.times, settings)
        self.max_ratio = max_ratio
        self._metrics = None if registry is None else Metrics(registry, name, self._names)
        if self._metrics is not None:
            self._metrics.watch(self.status)

    def _profile(self, profile: Any, sizes: dict[str, Any]) -> LevelTimes:
        if profile is None:
            return measure(self.model, self.levels, **sizes)
        if not isinstance(profile, LevelTimes):
            path = Path(profile)
            if not path.is_file():
                times = measure(self.model, self.levels, **sizes)
                times.save(path)
                return times
            profile = LevelTimes.load(path)
        return profile.only(self._names)

    @property
    def level(self) -> str:
        """The name of the level that was chosen last."""
        return self._names[self._policy.level]

    @property
    def max_ratio(self) -> int | None:
        """No level with a ratio above this is used; None: all may be. It can be set at any time.

        Raises:
            ValueError: no level is left.
        """
        return self._max_ratio

    @max_ratio.setter
    def max_ratio(self, value: int | None) -> None:
        if value is not None:
            checks.integer(value, "max_ratio", 1)
        allowed = [i for i, k in enumerate(self._highest) if value is None or k <= value]
        if not allowed:
            raise ValueError(
                f"max_ratio must leave a level of {self._names}, whose highest ratios are "
                f"{self._highest}, got {value}"
            )
        with self._lock:
            self._max_ratio, self._policy.allowed = value, allowed

    def arrive(self, tokens: int, ratio: Any = None) -> Ticket:
        """A request has come. Its ticket goes to :meth:`batch`, or to :meth:`cancel`.

        Args:
            tokens: of the request.
            ratio: the name of a level that it asks for, or its number where that is the name;
                None leaves it to the controller.

        Raises:
            ValueError: there is no such level, or it is above :attr:`max_ratio`.
        """
        checks.integer(tokens, "tokens", 1)
        level = None if ratio is None else self._number(ratio)
        with self._lock:
            ticket = Ticket(self._clock(), tokens, level)
            self._policy.waiting.arrive(ticket)
        return ticket

    def _number(self, ratio: Any) -> int:
        allowed = [self._names[i] for i in self._policy.allowed]
        if isinstance(ratio, bool) or str(ratio) not in allowed:
            raise ValueError(f"ratio must be one of {', '.join(allowed)}, got {ratio!r}")
        return self._names.index(str(ratio))

    def cancel(self, ticket: Ticket) -> None:
        """A request that waits will not be run; one that does not wait is let be."""
        with self._lock:
            if ticket in self._policy.waiting.tickets:
                self._policy.waiting.leave((ticket,))

    @contextmanager
    def batch(self, tickets: Sequence[Ticket]) -> Iterator[Choice]:
        """Run a batch: inside, the model is at the level that was chosen, in this thread or task.
        Its time is learned from: on a GPU synchronise before it ends.

        Args:
            tickets: of its requests, which waited until now and ask for the same level or for none.

        Raises:
            ValueError: there is none, one does not wait (any more) or is there twice, or they ask
                for different levels; then nothing has begun.
        """
        asked = {ticket.level for ticket in tickets}
        policy = self._policy
        with self._lock:
            waiting = policy.waiting.tickets
            if len(asked) != 1 or len(set(tickets)) != len(tickets):
                raise ValueError(
                    "tickets must be at least one, each once, and ask for the same level, got "
                    f"{len(tickets)} that ask for {len(asked)} levels"
                )
            if not all(map(waiting.__contains__, tickets)):
                missing = sum(ticket not in waiting for ticket in tickets)
                raise ValueError(f"tickets must wait, {missing} of {len(tickets)} do not")
            now, before = self._clock(), policy.level
            running = policy.begin(now, tickets, next(iter(asked)))
            switched = policy.level != before
            rows, tokens = policy.waiting.rows + running.rows, policy.waiting.tokens
            if self._metrics is not None:
                self._metrics.began(policy, switched)
        chosen = self._names[running.level]
        if switched:
            log.info(
                "%s: level %s -> %s: %s; %d requests, %d tokens, slowdown %.2f",
                self.name, self._names[before], chosen, running.reason, rows,
                tokens + running.tokens, policy.slowdown,
            )  # fmt: skip
        failed = True
        try:
            with use_ratio(self.model, self.levels[chosen]):
                yield Choice(chosen, self.levels[chosen], running.predicted * policy.slowdown)
            failed = False
        finally:
            with self._lock:
                now = self._clock()
                policy.end(now, running, learn=not failed)
                if self._metrics is not None:
                    self._metrics.ended(policy, running, now, failed)

    def status(self) -> dict[str, Any]:
        """What holds now, for a health route: plain values."""
        with self._lock:
            waiting, now = self._policy.waiting, self._clock()
            rates = [waiting.free.rate, *(load.rate for load in waiting.fixed)]
            return {
                "level": self.level,
                "levels": list(self._names),
                "max_ratio": self._max_ratio,
                "target_seconds": self._policy.settings.target,
                "waiting_requests": waiting.rows,
                "waiting_tokens": waiting.tokens,
                "running_batches": len(self._policy.running),
                "arriving_tokens_a_second": sum(rate.read(now) for rate in rates),
                "slowdown": self._policy.slowdown,
            }
