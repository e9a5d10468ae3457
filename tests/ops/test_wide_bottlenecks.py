"""Bottlenecks that a kernel takes in several pieces, each way, and layers of few tokens.

A program of few tokens writes a share of the columns; on a GPU, such layers have their own tiles.
"""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import every_kernel, feed_forward, kernels, masked, plugin  # noqa: F401
from tests.ops.test_backward import check
from tests.ops.test_forward import compare
from variator_kernels import functional as vf


@every_kernel
@pytest.mark.parametrize("r", [256, 300, 512])
def test_wide_bottlenecks(kernels, r):  # noqa: F811
    d, k, kind = 24, 4, "bert" if r == 300 else "t5"
    for dtype in (torch.bfloat16, *([] if kernels == "cuda" else [torch.float32])):
        x = torch.randn(1, 21, d).to(dtype)
        p, ffn = plugin(d, k, r, dtype), feed_forward(d, 40, dtype, kind)
        mask = masked("holes", 1, 21) if r == 512 else None
        compare(kernels, vf.compressed_ffn, x, (p, ffn), f"r={r} {dtype}", mask=mask)


@every_kernel
@pytest.mark.parametrize("r", [256, 512])
def test_gradients_of_wide_bottlenecks(kernels, r):  # noqa: F811
    dtype = torch.bfloat16 if kernels == "cuda" else torch.float32
    x = torch.randn(1, 21, 24, dtype=dtype)
    p, ffn = plugin(24, 4, r, dtype), feed_forward(24, 40, dtype, "t5")
    if dtype == torch.bfloat16:  # a unit of ReLU near 0 may flip, as in test_backward.py
        ffn = ffn._replace(activation="gelu")
    check(kernels, x, p, ffn)
