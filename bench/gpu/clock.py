"""Timing on a GPU: CUDA-graph replay behind an L2 flush, and eager wall time; the two ceilings.

Without a GPU (``--dry-run``) the same code runs and the wall clock stands in for the events.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20
Call = Callable[[], Any]


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES if self.gpu else 1, dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def works(self) -> bool:
        """Whether the device still computes; a kernel's bad address ends that for the process."""
        try:
            self.flush.zero_()
            self.synchronize()
        except RuntimeError:
            return False
        return True

    def graphed(self, call: Call) -> Call:
        """``call`` captured in a CUDA graph after three calls on another stream."""
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
            call()
        return graph.replay

    def interleaved(self, calls: Mapping[Any, Call], rounds: int) -> dict[Any, list[float]]:
        """Device seconds of each call in each round; L2 is flushed before every call."""
        order, shuffle = list(calls), random.Random(0).shuffle
        marks: dict[Any, list[Any]] = {key: [] for key in calls}
        for call in calls.values():
            call()
        gc.collect()
        for _ in range(rounds):
            shuffle(order)
            for key in order:
                self.flush.zero_()
                start = self._mark()
                calls[key]()
                marks[key].append((start, self._mark()))
        self.synchronize()
        return {key: [self._between(*pair) for pair in pairs] for key, pairs in marks.items()}

    def wall(self, calls: Mapping[Any, Call], rounds: int) -> dict[Any, list[float]]:
        """Seconds a call of a burst of calls, host to host, launches and Python included."""
        burst = 10 if self.gpu else 1
        seconds: dict[Any, list[float]] = {key: [] for key in calls}
        for _ in range(rounds):
            for key, call in calls.items():
                self.synchronize()
                start = time.perf_counter()
                for _ in range(burst):
                    call()
                self.synchronize()
                seconds[key].append((time.perf_counter() - start) / burst)
        return seconds

    def _mark(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.gpu else end - start

    def peak_memory(self, call: Call) -> int | None:
        """Bytes that a call allocates at most beyond what is allocated before it."""
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
        copied = min(self.interleaved({"copy": lambda: target.copy_(source)}, 10)["copy"])
        a, b = (torch.randn(side, side, device=self.device).to(torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        multiplied = min(self.interleaved({"mm": lambda: torch.mm(a, b, out=out)}, 10)["mm"])
        return {"copy": 2 * size / copied, "matrix": 2 * side**3 / multiplied}
