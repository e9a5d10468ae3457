"""group_merge alone."""

from __future__ import annotations

from typing import Any

from variator_kernels import functional

from .cells import BATCH, HIDDEN, LENGTH, cell, normal


def test_group_merge(benchmark: Any, isa: str, dtype: str, ratio: int, direction: str) -> None:
    inputs = (
        normal(BATCH, LENGTH, HIDDEN, dtype=dtype, seed=0),
        normal(ratio, ratio * HIDDEN, dtype=dtype, seed=1) * (ratio * HIDDEN) ** -0.5,
        normal(ratio, dtype=dtype, seed=2),
    )
    cell(
        benchmark,
        ("group_merge", ratio, dtype),
        direction,
        lambda backend: lambda *args: functional.group_merge(*args, backend=backend),
        inputs,
        (BATCH, LENGTH // ratio, HIDDEN),
    )
