"""How much memory a call takes: torch's allocations, and the growth of the process."""

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from .checks import Outputs


class Allocations(NamedTuple):
    """Bytes. ``peak`` counts the outputs, ``temporary`` does not; ``largest`` is one array."""

    peak: int
    temporary: int
    largest: int
    outputs: int


def _walk(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


def profiled(call: Callable[[], Outputs]) -> Allocations:
    """What a call allocates through torch, in order of time.

    Memory that kernels take around torch's allocator is not seen here; :func:`grown` sees it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = call()
    assert profiler.profiler is not None
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    allocation = torch._C._profiler._EventType.Allocation
    found = [event for event in _walk(tree) if event.tag == allocation]
    found.sort(key=lambda event: event.start_time_ns)
    kept = {tensor.untyped_storage().data_ptr() for tensor in outputs}
    live: dict[int, int] = {}
    last: dict[int, int] = {}
    events = [(e.extra_fields.ptr, e.extra_fields.alloc_size) for e in found]
    for index, (address, size) in enumerate(events):
        if size > 0 and address in kept:
            last[address] = index
    total = peak = temporary_total = temporary = largest = 0
    for index, (address, size) in enumerate(events):
        if size < 0 and address not in live:
            continue  # what was there before the call
        lasting = last.get(address, len(events)) <= index
        if size > 0:
            live[address] = size
            largest = max(largest, size)
        else:
            size = -live.pop(address)
        total += size
        temporary_total += 0 if lasting else size
        peak, temporary = max(peak, total), max(temporary, temporary_total)
    return Allocations(peak, temporary, largest, sum(live.get(p, 0) for p in kept))


def _high_water() -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    return int(found.group(1)) * 1024 if found else 0


def resident() -> int:
    """Bytes that this process holds now, without what the C library has kept of freed memory."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    held: int = psutil.Process().memory_info().rss
    return held


def grown(call: Callable[[], object]) -> int | None:
    """Growth of the resident set to its peak during a call; None where Linux's counters are not.

    For a fresh process only: memory freed before, but kept by the C library, would hide growth.
    """
    try:
        before = resident()
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
        call()
        return max(_high_water() - before, 0)
    except OSError:
        return None
