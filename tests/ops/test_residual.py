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
from tests.ops.test_backward import assert_gradient
from variator_kernels import functional as vf
from variator_kernels.ops.compressed_ffn import op
from variator_kernels.ops.feed_forward import PluginWeights
from variator_kernels.ops.make_groups import make_groups


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


@every_kernel_backend
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_without_a_residual(backend, fused):
    p, ffn = plugin(24, 4, 8, torch.float32), feed_forward(24, 40, torch.float32, "bert")
    ffn = ffn._replace(post_norm=False, norm="none", residual=False)
    x, dy = torch.randn(21, 24), torch.randn(21, 24)
    cu_seqlens = torch.tensor([0, 9, 21])

    def gradients(values, kernels):
        leaves = [t.clone().requires_grad_() for t in values]
        weights = PluginWeights(*leaves[1:], p.activation)
        if fused and kernels != "reference":
            groups = make_groups(x, 4, cu_seqlens=cu_seqlens, backend=kernels)
            y = op.compressed_ffn(leaves[0], weights, ffn, groups, kernels)
        else:
            y = vf.compressed_ffn(
                leaves[0], weights, cast(ffn, values[0].dtype), cu_seqlens=cu_seqlens,
                backend=kernels,
            )  # fmt: skip
        return torch.autograd.grad(y, leaves, dy.to(y.dtype))

    values = [x, *p[:6]]
    truth = gradients([t.double() for t in values], "reference")
    plain = gradients(values, "reference")
    for out, measure, exact in zip(gradients(values, backend), plain, truth, strict=True):
        assert_gradient(out, measure, exact, "gradient")
