"""adapter_decompress alone."""

from __future__ import annotations

from typing import Any

from variator_kernels import functional

from .cells import BATCH, BOTTLENECK, HIDDEN, LENGTH, cell, normal


def test_adapter_decompress(
    benchmark: Any, isa: str, dtype: str, ratio: int, direction: str
) -> None:
    inputs = (
        normal(BATCH, -(-LENGTH // ratio), HIDDEN, dtype=dtype, seed=0),
        normal(BATCH, LENGTH, HIDDEN, dtype=dtype, seed=1),
        normal(BOTTLENECK, 2 * HIDDEN, dtype=dtype, seed=2) * (2 * HIDDEN) ** -0.5,
        normal(BOTTLENECK, dtype=dtype, seed=3),
        normal(HIDDEN, BOTTLENECK, dtype=dtype, seed=4) * BOTTLENECK**-0.5,
        normal(HIDDEN, dtype=dtype, seed=5),
    )
    cell(
        benchmark,
        ("adapter_decompress", ratio, dtype),
        direction,
        lambda backend: (
            lambda *args: functional.adapter_decompress(*args, ratio=ratio, backend=backend)
        ),
        inputs,
        (BATCH, LENGTH, HIDDEN),
    )
