"""Triton's kernels on a GPU, predicted: ``python -m bench.tools.predict_triton``.

Nothing is measured and no GPU is used. Each kernel of a forward pass is compiled for sm_90, and its
machine code read: what a warp issues, inside loops as often as the size asks for, products on
tensor cores, bytes through shared memory; besides, each tensor's bytes once. The greatest of the
four is a bound. It sees no latency, no bank conflicts, no second read that misses L2, no operands
that HGMMA takes from shared memory itself, and counts code that a branch skips.
"""

import argparse
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bench.harness import tables
from bench.harness.machine import ROOT
from bench.tools.triton_cases import MODELS, sublayer
from bench.tools.triton_compiler import Launched, compiling, sass

OUTPUT = ROOT / "docs" / "gpu_predicted.md"
RATIOS = (2, 4, 8, 16)
SIZES = {"llama-7b": (8, 2048, 64)}
SIZE = (32, 512, 64)


class Chip(NamedTuple):
    """NVIDIA's data sheet of an SXM part; the clock is that of its dense bf16 FLOP rate."""

    processors: int
    hertz: float
    bytes_a_second: float
    tensor_flops_a_clock: int = 4096
    issues_a_clock: int = 4
    shared_bytes_a_clock: int = 128


CHIPS = {"H100": Chip(132, 1.83e9, 3.35e12), "H200": Chip(132, 1.83e9, 4.8e12)}


class Count(NamedTuple):
    """What one warp does."""

    slots: float = 0.0
    flops: float = 0.0
    shared: float = 0.0


LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]+);")
BRANCH = re.compile(r"BRA(?:\.\w+)?\s+(?:\S+,\s*)?`?\(?0x([0-9a-f]+)")
LANES = 32


def _count(instruction: str) -> Count:
    """One instruction: its issue slot, FLOPs, and bytes between registers and shared memory."""
    name = instruction.split()[0]
    if wide := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        m, n, k = map(int, wide.groups())
        return Count(1, 2 * m * n * k / 4, 0)  # four warps make it together
    if small := re.match(r"HMMA\.16(8)(16|8)", name):
        return Count(1, 2 * 16 * 8 * int(small[2]), 0)
    if re.match(r"(LDS|STS|LDGSTS)\b", name):
        width = re.search(r"\.(128|64|U8|S8|U16|S16)\b", name)
        of = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
        return Count(1, 0, LANES * (of[width[1]] if width else 4))
    if matrices := re.match(r"(?:LDSM|STSM)\.16\.\w*88(?:\.([24]))?", name):
        return Count(1, 0, 128 * int(matrices[1] or 1))
    return Count(1)


def count(code: str, trips: list[int]) -> Count:
    """A warp's whole way through ``code``, whose loops run ``trips`` times, in their order.

    Raises:
        ValueError: the code has another number of loops.
    """
    lines = [(int(at, 16), text.strip()) for at, text in LINE.findall(code)]
    ends = [i for i, (_, text) in enumerate(lines) if text.startswith("EXIT")]
    lines = lines[: ends[-1] + 1]  # behind it lie subroutines and padding
    loops = []
    for at, text in lines:
        if (branch := BRANCH.match(text)) and int(branch[1], 16) < at:
            loops.append((int(branch[1], 16), at))
    loops.sort()
    if len(loops) != len(trips):
        raise ValueError(f"the machine code has {len(loops)} loops, {len(trips)} are expected")
    total = Count()
    for at, text in lines:
        times = 1
        for (first, last), often in zip(loops, trips, strict=True):
            times *= often if first <= at <= last else 1
        total = Count(*(a + times * b for a, b in zip(total, _count(text), strict=True)))
    return total


def _merge(a: dict[str, Any]) -> list[int]:
    if a["R"] > a["BR"]:
        raise ValueError("further pieces of the bottleneck are loops of their own")
    walks = 1 + ({"layer": 2, "rms": 1}[a["NORM"]] if a["STATISTICS_FIRST"] else 0)
    return [-(-a["d"] // a["BD"])] * walks + [-(-a["d"] // a["BS"])] * (a["SC"] == a["K2"])


# How often the loops of a kernel run, in their order.
TRIPS: dict[str, Callable[[dict[str, Any]], list[int]]] = {
    "group_merge_kernel": _merge,
    "weighted_sum_kernel": lambda a: [],
    "adapter_decompress_kernel": lambda a: [-(-a["d"] // a["BD"]), a["across"]],
    "row_norm_kernel": lambda a: [],
}


def predict(launch: Launched, chip: Chip) -> dict[str, Any]:
    """Microseconds that a launch takes at least, by what could bound it."""
    a, programs = launch.arguments, 1
    for extent in launch.grid:
        programs *= extent
    warps = launch.kernel.metadata.num_warps
    turns = -(-programs // chip.processors)  # programs of the busiest multiprocessor
    found: dict[str, Any] = {"kernel": launch.name, "programs": programs}
    tensors = [getattr(value, "base", value) for value in a.values()]
    moved = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    found["memory"] = moved / chip.bytes_a_second * 1e6
    if launch.name == "linear_kernel":  # its loops are one, and tiles fill the tensor cores
        tiles = -(-a["rows"] // a["BM"]) * -(-a["columns"] // a["BN"])
        flops = 2 * a["BM"] * a["BN"] * a["inner"] * (2 if a["GATED"] else 1)
        clocks = -(-tiles // chip.processors) * flops / chip.tensor_flops_a_clock
        found["tensor"] = clocks / chip.hertz * 1e6
    else:
        one = count(sass(launch.kernel.asm["cubin"]), TRIPS[launch.name](a))
        rates = chip.issues_a_clock, chip.tensor_flops_a_clock, chip.shared_bytes_a_clock
        names = ("issue", "tensor", "shared")
        for name, number, rate in zip(names, one, rates, strict=True):
            found[name] = turns * warps * number / rate / chip.hertz * 1e6
        found["slots"] = round(one.slots * warps)
    bounds = {n: found[n] for n in ("issue", "tensor", "shared", "memory") if n in found}
    found["by"] = max(bounds, key=lambda n: bounds[n])
    return {**found, "bound": bounds[found["by"]]}


def rows(models: list[str], ratios: list[int], chip: str) -> list[dict[str, Any]]:
    """A row a launch of each model's forward pass."""
    made = []
    for model, k in itertools.product(models, ratios):
        size = SIZES.get(model, SIZE)
        with compiling("sm_90") as launches:
            sublayer(MODELS[model], k, torch.bfloat16, backward=False, size=size)()
        where = {"model": model, "size": f"{size[0]} x {size[1]}", "k": k}
        made += [{**where, **predict(launch, CHIPS[chip])} for launch in launches]
        print(model, k, flush=True)
    return made


def _microseconds(name: str) -> tables.Column:
    return tables.Column(f"{name}, µs", lambda row: f"{row[name]:.1f}" if name in row else "-")


COLUMNS = [
    *(tables.key(name, name) for name in ("model", "size", "k", "kernel", "programs")),
    tables.Column("slots a program", lambda row: str(row.get("slots", "-"))),
    *map(_microseconds, ("issue", "tensor", "shared", "memory", "bound")),
    tables.key("by", "by"),
]


def markdown(made: list[dict[str, Any]], chip: str) -> str:
    """The page: what the numbers are and are not, and the table."""
    of = CHIPS[chip]
    return f"""# The Triton kernels on a GPU, predicted

**Predicted from machine code, never measured.** No GPU was used.
`python -m bench.tools.predict_triton` wrote it (Triton {triton.__version__}, bf16, r = 64) for an
{chip} as its data sheet describes it: {of.processors} multiprocessors, {of.hertz / 1e9:g} GHz,
{of.bytes_a_second / 1e12:g} TB/s.

The bound is the greatest of four: instructions issued (four a clock and multiprocessor, by the
multiprocessor that has most programs), products on tensor cores, bytes between registers and shared
memory, and every tensor's bytes once. Not seen: latency, bank conflicts, second reads that miss L2,
operands that HGMMA takes from shared memory itself, launches, and the second product, which is
cuBLAS's. Code that a branch skips is counted. `linear_kernel` has its tensor time by tiles alone.
Gradients, attention and the CUDA kernels are not in it.

{tables.markdown(COLUMNS, made)}
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ratio", nargs="+", type=int, default=list(RATIOS))
    parser.add_argument("--chip", choices=CHIPS, default="H200")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    made = rows(chosen.model, chosen.ratio, chosen.chip)
    chosen.output.write_text(markdown(made, chosen.chip))
    print(f"written to {chosen.output}")


if __name__ == "__main__":
    main()
