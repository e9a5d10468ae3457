"""What the cells share: sizes, inputs, and the check that comes before every timing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.common import models
from bench.common.checks import Outputs, Truth, judge, truth

BATCH, LENGTH, HIDDEN, INNER, BOTTLENECK = 8, 512, 768, 3072, 64
RATIOS = (2, 4, 8, 16, 32)
DTYPES = ("fp32", "bf16", "fp16")

Op = Callable[..., Tensor]


def normal(*shape: int, dtype: str, seed: int) -> Tensor:
    """Unit input, in the dtype."""
    return torch.randn(*shape, generator=models.generator(seed)).to(models.DTYPES[dtype])


def forward(op: Op, inputs: tuple[Tensor, ...], seed: Tensor) -> Callable[[], Outputs]:
    """The op alone."""

    def call() -> Outputs:
        with torch.no_grad():
            return (op(*inputs),)

    return call


def backward(op: Op, inputs: tuple[Tensor, ...], seed: Tensor) -> Callable[[], Outputs]:
    """The backward alone: the forward has run."""
    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    out = op(*leaves)
    seed = seed.view_as(out).to(out.dtype)
    return lambda: torch.autograd.grad(out, leaves, seed, retain_graph=True)


DIRECTIONS = {"forward": forward, "backward": backward}
_truths: dict[tuple, Truth] = {}


def cell(
    benchmark: Any,
    name: tuple[str, int, str],
    direction: str,
    op: Callable[[str], Op],
    inputs: tuple[Tensor, ...],
    out: tuple[int, ...],
) -> None:
    """Check ``op("cpu")`` against ``op("reference")`` in float64, then time it.

    ``name`` (op, ratio, dtype) and direction tell inputs apart: instruction sets share the truth.
    """
    make = DIRECTIONS[direction]
    seed = torch.randn(*out, generator=models.generator(20)).to(inputs[0].dtype)
    if (*name, direction) not in _truths:
        exact = make(op("reference"), tuple(tensor.double() for tensor in inputs), seed)()
        _truths.clear()
        _truths[(*name, direction)] = truth(exact, make(op("reference"), inputs, seed)())
    call = make(op("cpu"), inputs, seed)
    verdict = judge(call(), _truths[(*name, direction)])
    assert verdict.ok, verdict
    benchmark.group = " ".join((name[0], direction, name[2], f"k={name[1]}"))
    benchmark.extra_info.update(error=verdict.error, allowed=verdict.allowed)
    benchmark.pedantic(call, rounds=10, iterations=1, warmup_rounds=1)
