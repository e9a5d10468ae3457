"""What a controller tells Prometheus."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from .controller_policy import Batch, Policy

BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

_families: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


class Metrics:
    """The metrics of one controller in a registry, all labelled with ``controller``."""

    def __init__(self, registry: Any, controller: str, names: tuple[str, ...]) -> None:
        """Raises ImportError: prometheus_client is not installed."""
        try:
            from prometheus_client import Counter, Gauge, Histogram
        except ImportError as error:
            raise ImportError(
                "registry needs prometheus_client: pip install 'variator-kernels[serve]'"
            ) from error

        families = _families.setdefault(registry, {})

        def made(kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
            if name not in families:  # several controllers may share a registry
                words = ("controller", *labels)
                families[name] = kind(f"variator_{name}", text, words, registry=registry, **more)
            if not labels:
                return families[name].labels(controller)
            return [families[name].labels(controller, level) for level in names]

        self.requests = made(Counter, "requests", "Requests answered, by level", "level")
        self.batches = made(Counter, "batches", "Batches run, by level", "level")
        self.tokens = made(Counter, "tokens", "Tokens answered, by level", "level")
        self.failed = made(Counter, "failed_batches", "Batches that raised an error")
        self.switches = made(Counter, "switches", "Changes of the level")
        self.level = made(Gauge, "level", "Number of the level, 0 the least compressed")
        self.read = {
            "waiting_requests": made(Gauge, "waiting_requests", "Requests that wait"),
            "waiting_tokens": made(Gauge, "waiting_tokens", "Tokens that wait"),
            "arriving_tokens_a_second": made(
                Gauge, "arriving_tokens", "Tokens that arrive a second"
            ),
        }
        self.slowdown = made(Gauge, "slowdown", "What batches take, over what was measured")
        self.seconds = made(
            Histogram,
            "oldest_request_seconds",
            "From arrival to answer, of the oldest request of each batch",
            buckets=BUCKETS,
        )

    def watch(self, status: Callable[[], dict[str, Any]]) -> None:
        """What changes without a batch is read when it is asked for. ``status``: a bound method;
        its controller is not kept alive, and where it is gone nothing waits."""
        found = weakref.WeakMethod(status)

        def read(name: str) -> float:
            now = found()
            return 0.0 if now is None else float(now()[name])

        for name, gauge in self.read.items():
            gauge.set_function(functools.partial(read, name))

    def began(self, policy: Policy, switched: bool) -> None:
        self.level.set(policy.level)
        if switched:
            self.switches.inc()

    def ended(self, policy: Policy, batch: Batch, now: float, failed: bool) -> None:
        self.slowdown.set(policy.slowdown)
        if failed:
            self.failed.inc()
            return
        self.requests[batch.level].inc(batch.rows)
        self.batches[batch.level].inc()
        self.tokens[batch.level].inc(batch.tokens)
        self.seconds.observe(now - batch.oldest)
