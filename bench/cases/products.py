"""The FFN's two products of merged rows, in bf16 and quantised, by PyTorch's own kernels.

They say what a quantised FFN would bring on a GPU, where nothing of the package is quantised.
Weights and activations are quantised before the clock runs; scales are applied behind int8 in
passes of their own, and by the product itself in fp8. ``bench/products.py`` has the CPU's.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness.checks import QUANTISED, Truth
from ..harness.compiling import Unavailable
from ..harness.runner import first_line
from . import Arm, Call, Case, Key, models

PLAIN, INT8, FP8 = "linear", "int8", "fp8"
ARMS = (PLAIN, INT8, FP8)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
FAULTS: Any = getattr(torch, "AcceleratorError", ())
"""Of the device itself, an illegal address for one; PyTorch before 2.8 does not tell them apart."""
Matrices = tuple[Tensor, Tensor]
"""``a [rows, in]`` and ``weight [out, in]``, both in bf16."""


def quantised(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of each row the numbers and their scale ``[rows, 1]``, in fp32."""
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True) / LARGEST[kind]
    whole = (wide / scale).round() if kind == torch.int8 else wide / scale
    return whole.to(kind), scale


def _linear(a: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: F.linear(a, weight)


def _int8(a: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    (x, by_row), (w, by_channel) = (quantised(t, torch.int8) for t in (a, weight))
    return lambda: (torch._int_mm(x, w.t()) * by_row * by_channel.t()).to(a.dtype)


def _fp8(a: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    (x, by_row), (w, by_channel) = (quantised(t, torch.float8_e4m3fn) for t in (a, weight))
    # Sums that are only as wide as Hopper's tensor cores make them, as in inference elsewhere.
    return lambda: torch._scaled_mm(
        x, w.t(), by_row, by_channel.t(), out_dtype=a.dtype, use_fast_accum=True
    )


BUILD = {PLAIN: _linear, INT8: _int8, FP8: _fp8}


def _call(arm: str, matrices: Callable[[], Matrices]) -> Call:
    multiply = BUILD[arm](*matrices())
    try:
        multiply()
    except (torch.OutOfMemoryError, FAULTS):
        raise
    except (RuntimeError, ValueError) as error:  # what the device has no kernel for
        if arm == PLAIN:
            raise
        raise Unavailable(first_line(error)) from error
    return lambda: (multiply(),)


def cases(
    model: models.Architecture, batch: int, length: int, k: int, device: str,
    arms: Iterable[str] = ARMS,
) -> list[Case]:  # fmt: skip
    """A case a product, of the groups of ``batch`` rows."""
    d, f = model.config.hidden_size, models.inner_size(model.config)
    rows = batch * -(-length // k)
    made = []
    for name, inner, outputs in (("products in", d, f), ("products out", f, d)):

        @cache
        def matrices(inner: int = inner, outputs: int = outputs) -> Matrices:
            source = models.generator(8)
            a, weight = (torch.randn(n, inner, generator=source) for n in (rows, outputs))
            weight *= inner**-0.5
            return a.to(device, torch.bfloat16), weight.to(device, torch.bfloat16)

        def measure(key: Key, matrices: Callable[[], Matrices] = matrices) -> Truth:
            a, weight = matrices()
            return Truth((F.linear(a.double(), weight.double()),), (), QUANTISED)

        case = Case(name, "kernel", "forward", model.name, "bf16", batch, length, measure)
        case.arms = [Arm(Key(arm, k), partial(_call, arm, matrices), rows) for arm in arms]
        made.append(case)
    return made
