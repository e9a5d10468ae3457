"""A sublayer that leaves the residual to its block (DistilBERT's) gives the FFN's part alone."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import (
    assert_close,
    cast,
    every_kernel_backend,
    feed_forward,
    masked,
    moved,
    plugin,
)
from variator_kernels import functional as vf


@every_kernel_backend
@pytest.mark.parametrize("grad", [False, True], ids=["fused", "layered"])
@pytest.mark.parametrize("mask_kind", ["none", "left", "holes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_residual(dtype, mask_kind, grad, backend):
    p, ffn = plugin(24, 4, 8, dtype), feed_forward(24, 40, dtype, "bert")
    ffn = ffn._replace(post_norm=False, norm="none", residual=False)
    x = torch.randn(3, 19, 24).to(dtype)
    mask = masked(mask_kind, 3, 19)
    x = 100 * x  # what x + o - x would lose
    p = p._replace(w1=p.w1 / 100)
    truth = vf.compressed_ffn(
        x.double(), cast(p, torch.double), cast(ffn, torch.double), mask=mask, backend="reference"
    )
    plain = vf.compressed_ffn(x, p, ffn, mask=mask, backend="reference")
    with torch.set_grad_enabled(grad):
        there = (moved(value, backend) for value in (x.clone().requires_grad_(grad), p, ffn))
        out = vf.compressed_ffn(*there, mask=moved(mask, backend), backend=backend).detach().cpu()
    assert_close(out, plain, truth)
    if mask is not None:
        assert (out[~mask] == 0).all()
