"""Three clocks: wall time on the CPU; CUDA-graph replay behind an L2 flush; eager CUDA calls.

Without a GPU the last two do the same on the CPU, so that a dry run goes their way.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

FLUSH_BYTES = 256 * 2**20
LEAST_ROUNDS = 3
Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], Any]


class Wall:
    """Wall time of a call on the CPU."""

    name = "wall"
    burst = 1
    """Calls between two readings."""
    share = 1
    """It takes the rounds of the first clock divided by this."""
    settles = True
    """Calls an arm once untimed right before each timed call, where a case asks for it."""
    captures = False

    def prepare(self, call: Call) -> Call:
        """What is timed in place of ``call``."""
        return call

    def ready(self) -> None:
        """Before each timed call."""

    def read(self) -> Any:
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        return end - start

    def interleave(
        self,
        calls: Mapping[Key, Call],
        rounds: int,
        advance: Callable[[], None] = lambda: None,
        settle: bool = False,
        until: float = math.inf,
        before: Callable[[Key], None] = lambda key: None,
        rest: float = 0.0,
    ) -> tuple[dict[Key, list[float]], dict[Key, Any]]:
        """Seconds of each call in each round, and each call's last output.

        After three rounds none begins behind ``until``, a reading of ``time.perf_counter``.

        Every arm runs once a round, so that drift of the machine hits all alike. The order changes
        from round to round, from a fixed seed: no arm always follows the same one. ``settle``: an
        arm pays neither for what the one before it left in the caches nor for memory it gave back.
        ``rest``: seconds in which nothing runs before each turn.
        """
        marks: dict[Key, list[Any]] = {key: [] for key in calls}
        last: dict[Key, Any] = {}
        order, shuffle = list(calls), random.Random(0).shuffle
        gc.collect()
        gc.disable()
        try:
            for turn in range(rounds):
                if turn >= LEAST_ROUNDS and time.perf_counter() > until:
                    break
                last.clear()  # outputs of one round alone are kept
                shuffle(order)
                for key in order:
                    if rest:
                        time.sleep(rest)
                    if settle and self.settles:
                        calls[key]()
                    before(key)
                    self.ready()
                    start = self.read()
                    for _ in range(self.burst):
                        out = calls[key]()
                    marks[key].append((start, self.read()))
                    last[key] = out
                    del out
                    advance()
        finally:
            gc.enable()
        self.ready()
        return {
            key: [self.seconds(*pair) / self.burst for pair in pairs]
            for key, pairs in marks.items()
        }, last

    def peak_memory(self, call: Call) -> int | None:
        """Bytes that a call allocates at most beyond what is allocated before it; None: unknown."""
        return None


class Eager(Wall):
    """Host time a call of a burst of CUDA calls: launches and Python included."""

    name, share, settles = "eager", 4, False

    def __init__(self, device: str) -> None:
        self.gpu, self.device = device == "cuda", device
        self.burst = 10 if self.gpu else 1

    def ready(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def read(self) -> Any:
        self.ready()
        return time.perf_counter()


class Graph(Eager):
    """Device time of a call captured in a CUDA graph; the L2 cache is flushed before each."""

    name, share = "graph", 1

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.burst, self.captures = 1, self.gpu
        numbers = FLUSH_BYTES // 4 if self.gpu else 1
        self.flush, self.clean = (
            torch.zeros(numbers, dtype=torch.int32, device=device) for _ in range(2)
        )

    def works(self) -> bool:
        """Whether the device still computes; a kernel's bad address ends that for the process."""
        try:
            self.flush.zero_()
            super().ready()
        except RuntimeError:
            return False
        return True

    def prepare(self, call: Call) -> Call:
        """``call`` captured after three calls on another stream."""
        if not self.gpu:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()

        def replay() -> Any:
            graph.replay()
            return out

        return replay

    def ready(self) -> None:
        """Writing empties the L2 cache of what it held; reading other memory then takes the written
        lines out, which the timed call would have to write back."""
        self.flush.zero_()
        self.clean.amax()

    def read(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if self.gpu:
            end.synchronize()
        return start.elapsed_time(end) / 1e3 if self.gpu else end - start

    def peak_memory(self, call: Call) -> int | None:
        if not self.gpu:
            return None
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def ceilings(self) -> dict[str, float]:
        """Copied bytes a second (read and written), and matrix FLOPs a second on random bf16."""
        size, side = (2**32, 8192) if self.gpu else (2**20, 64)
        source = torch.empty(size, dtype=torch.int8, device=self.device).random_()
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=self.device).to(torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        calls = {"copy": lambda: target.copy_(source), "matrix": lambda: torch.mm(a, b, out=out)}
        for call in calls.values():
            call()
        best = {name: min(seconds) for name, seconds in self.interleave(calls, 10)[0].items()}
        return {"copy": 2 * size / best["copy"], "matrix": 2 * side**3 / best["matrix"]}


def quartiles(samples: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(samples) == 1:
        return dict.fromkeys(("q1", "median", "q3"), samples[0])
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Speed-up by round (both arms of one round), then its quartiles."""
    return quartiles([a / b for a, b in zip(slow, fast, strict=True)])


def median_of(call: Call, repeats: int) -> float:
    """Median seconds of a call after one warm-up; for choosing between variants only."""
    call()
    return statistics.median(Wall().interleave({"": call}, repeats)[0][""])
