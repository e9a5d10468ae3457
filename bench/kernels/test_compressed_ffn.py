"""compressed_ffn: the whole sublayer, the FFN frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from variator_kernels import functional
from variator_kernels.ops.feed_forward import FeedForward, PluginWeights

from .cells import BATCH, BOTTLENECK, HIDDEN, INNER, LENGTH, cell, normal


def test_compressed_ffn(benchmark: Any, isa: str, dtype: str, ratio: int, direction: str) -> None:
    ffn = FeedForward(
        normal(INNER, HIDDEN, dtype=dtype, seed=0) * HIDDEN**-0.5,
        normal(HIDDEN, INNER, dtype=dtype, seed=1) * INNER**-0.5,
        norm="rms",
        norm_weight=normal(HIDDEN, dtype=dtype, seed=2),
    )
    inputs = (
        normal(BATCH, LENGTH, HIDDEN, dtype=dtype, seed=3),
        normal(ratio, ratio * HIDDEN, dtype=dtype, seed=4) * (ratio * HIDDEN) ** -0.5,
        normal(ratio, dtype=dtype, seed=5),
        normal(BOTTLENECK, 2 * HIDDEN, dtype=dtype, seed=6) * (2 * HIDDEN) ** -0.5,
        normal(BOTTLENECK, dtype=dtype, seed=7),
        normal(HIDDEN, BOTTLENECK, dtype=dtype, seed=8) * BOTTLENECK**-0.5,
        normal(HIDDEN, dtype=dtype, seed=9),
    )

    def op(backend: str) -> Callable[..., Tensor]:
        def call(x: Tensor, *weights: Tensor) -> Tensor:
            cast = FeedForward._make(v.to(x.dtype) if isinstance(v, Tensor) else v for v in ffn)
            plugin = PluginWeights._make((*weights, "tanh"))
            return functional.compressed_ffn(x, plugin, cast, backend=backend)

        return call

    cell(
        benchmark, ("compressed_ffn", ratio, dtype), direction, op, inputs, (BATCH, LENGTH, HIDDEN)
    )
