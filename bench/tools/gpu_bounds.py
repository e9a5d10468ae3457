"""What could bound a launch on a GPU, from what one of its thread blocks does."""

from typing import Any, NamedTuple

from bench.tools.sass_walk import Count


class Chip(NamedTuple):
    """NVIDIA's data sheet of an SXM part; the clock is that of its dense bf16 FLOP rate."""

    processors: int
    hertz: float
    bytes_a_second: float
    tensor_flops_a_clock: int = 4096
    issues_a_clock: int = 4


CHIPS = {"H100": Chip(132, 1.83e9, 3.35e12), "H200": Chip(132, 1.83e9, 4.8e12)}


class Work(NamedTuple):
    """A launch: thread blocks, what one of them does, and bytes of every tensor once."""

    kernel: str
    blocks: int
    moved: int
    one: Count


def predict(work: Work, chip: Chip) -> dict[str, Any]:
    """Microseconds that a launch takes at least, by what could bound it."""
    turns = -(-work.blocks // chip.processors)  # thread blocks of the busiest multiprocessor
    clocks = {"tensor": work.one.flops / chip.tensor_flops_a_clock}
    if work.one.slots:
        clocks |= {
            "issue": work.one.slots / chip.issues_a_clock,
            "shared": work.one.shared,
            "L1": work.one.shared + work.one.cached,
        }
    bounds = {name: turns * number / chip.hertz * 1e6 for name, number in clocks.items()}
    bounds["memory"] = work.moved / chip.bytes_a_second * 1e6
    by = max(bounds, key=lambda name: bounds[name])
    found = {"kernel": work.kernel, "blocks": work.blocks, "slots": round(work.one.slots) or None}
    return {
        **found,
        **{n: round(v, 2) for n, v in bounds.items()},
        "bound": round(bounds[by], 2),
        "by": by,
    }
