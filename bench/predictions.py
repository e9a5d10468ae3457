"""Measured kernels beside the bounds that were predicted for them (``bench.tools.predict_gpu``).

A bound is of a launch, and a measured case may be several: their bounds add up. What PyTorch does
beside them (sums over parts, copies) is in no bound, so a case may only take longer.
"""

import json
import re
from collections.abc import Hashable, Iterable
from typing import Any

from .harness import tables
from .harness.machine import RESULTS
from .harness.results import Row

FIGURES = RESULTS / "compiled" / "predicted.json"
BELOW = "below its bound: the model is wrong"
# The case of `bench/cases/kernels.py` that makes a launch; both backends' names are in it.
CASES = {
    "group_merge_kernel": "group_merge",
    "weighted_sum_kernel": "group_merge",
    "merge_kernel": "group_merge",
    "adapter_decompress_kernel": "adapter_decompress",
    "decompress_kernel": "adapter_decompress",
    "score_gradient_kernel": "group_merge_backward",
    "merge_backward_kernel": "group_merge_backward",
    "weight_gradient_kernel: W_c, W_1h": "group_merge_backward",
    "inner_gradient_kernel": "adapter_decompress_backward",
    "group_gradient_kernel": "adapter_decompress_backward",
    "decompress_backward_kernel": "adapter_decompress_backward",
    "weight_gradient_kernel: W_1u": "adapter_decompress_backward",
    "weight_gradient_kernel: W_2, b_2": "adapter_decompress_backward",
}


def chip(gpu: str | None) -> str | None:
    """The chip of the predictions that a device's name says it is, if any.

    They are of SXM parts: others of the name have other clocks and memory, GH200 is no H200.
    """
    name = gpu or ""
    found = re.search(r"\b(H100|H200)\b", name)
    return found[1] if found and not re.search(r"\b(PCIe|NVL|MIG)\b", name) else None


def case_of(kernel: str, before: str | None) -> str | None:
    """The case that a launch belongs to; ``before``: that of the launch in front of it."""
    if kernel == "weight_sums_kernel":  # Triton's of both backward passes, at the end of each
        return before
    product = re.fullmatch(r"gemm_.*: (\d+) x (\d+)", kernel)
    if product:
        return "product in" if int(product[1]) > int(product[2]) else "product out"
    return CASES.get(kernel)


def key(row: Row) -> Hashable:
    """What tells rows of single kernels apart."""
    return tuple(row[name] for name in ("case", "arm", "model", "batch", "length", "k"))


def bounds(name: str, rows: Iterable[Row]) -> dict[Hashable, dict[str, float]]:
    """By :func:`key` the launches of a case and the bound of each, in us, on the chip ``name``."""
    made: dict[Hashable, dict[str, float]] = {}
    before, column = None, "bound" if name == "H200" else name
    for row in rows:
        before = case_of(row["kernel"], before)
        batch, length = map(int, row["size"].split(" x "))
        of = {"case": before, "arm": row["backend"], "batch": batch, "length": length}
        launches = made.setdefault(key({**row, **of}), {})
        # Of a gated sublayer's two products of one size the case is the first.
        launches.setdefault(row["kernel"], row[column])
    return made


def compared(measured: Iterable[Row], gpu: str | None) -> list[Row]:
    """A row a measured kernel that has a bound on this GPU: both in us, and bound / measured."""
    name = chip(gpu)
    if name is None:
        return []
    known, made = bounds(name, json.loads(FIGURES.read_text())["rows"]), []
    for row in measured:
        launches = known.get(key(row))
        if launches is None or row["status"] != "ok" or row["dtype"] != "bf16":
            continue
        took, bound = row["median"] * 1e6, sum(launches.values())
        found: dict[str, Any] = {n: row[n] for n in ("case", "arm", "model", "batch", "length")}
        made.append({
            **found, "k": row["k"], "chip": name, "launches": list(launches), "measured": took,
            "bound": bound, "share": bound / took, "note": BELOW if took < bound else "",
        })  # fmt: skip
    return made


COLUMNS = [
    tables.key("kernel", "case"),
    tables.key("arm", "arm"),
    tables.Column("where", lambda row: f"{row['model']}, {row['batch']} x {row['length']}"),
    tables.key("k", "k"),
    tables.number("measured, µs", lambda row: row["measured"], ".1f"),
    tables.number("predicted bound, µs", lambda row: row["bound"], ".1f"),
    tables.number("bound / measured", lambda row: row["share"]),
]
