"""The norm of inference against the plain one, and a wrong dtype beside it."""

import pytest
import torch

from variator_kernels.ops.arguments import Norm
from variator_kernels.ops.fast_norm import normalize_fast, rms_of_few
from variator_kernels.ops.feed_forward import normalize


@pytest.mark.parametrize("kind", ["rms", "layer", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mixed", [False, True])
@torch.no_grad()
def test_within_twice_the_error_of_the_plain_norm(kind, dtype, mixed):
    torch.manual_seed(0)
    x = (3 * torch.randn(3, 7, 40, dtype=torch.float64)).to(dtype).transpose(0, 1)
    weight = (torch.rand(40, dtype=torch.float64) + 0.5).to(dtype)
    bias = torch.randn(40).to(torch.float32 if mixed else dtype) if kind == "layer" else None
    norm = (kind, weight, bias, 1e-6)
    wide = (kind, weight.double(), None if bias is None else bias.double(), 1e-6)
    exact = normalize(x.double(), *wide)
    plain, got = normalize(x, *norm), normalize_fast(x, Norm(*norm))
    assert got.dtype == plain.dtype and got.shape == x.shape
    error = (got.double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + 1e-6


def test_gradients_take_the_plain_norm():
    x = torch.randn(2, 8, requires_grad=True)
    normalize_fast(x, Norm("rms", torch.ones(8), None, 1e-6)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [1, 40, 577])
@torch.no_grad()
def test_few_vectors_in_one_call(dtype, d):
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 1, d)).to(dtype)
    weight = torch.nn.Parameter((torch.rand(d) + 0.5).to(dtype))
    exact = normalize(x.double(), "rms", weight.double(), None, 1e-6)
    plain, got = normalize(x, "rms", weight, None, 1e-6), rms_of_few(x, weight, 1e-6)
    assert got.dtype == dtype and got.shape == x.shape
    error = (got.double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + 1e-6
    weight.mul_(2)  # what is kept of it is where it lies
    assert torch.equal(rms_of_few(x, weight, 1e-6), 2 * got)


def test_few_vectors_that_are_not_for_one_call():
    x, weight = torch.randn(1, 1, 8), torch.nn.Parameter(torch.ones(8))
    assert rms_of_few(x, weight, 1e-6) is None  # a gradient
    with torch.no_grad():
        assert rms_of_few(x, weight, 1e-6) is not None
        assert rms_of_few(x.double(), weight, 1e-6) is None
        assert rms_of_few(x, weight.double(), 1e-6) is None
        assert rms_of_few(x[..., ::2], torch.nn.Parameter(torch.ones(4)), 1e-6) is None
        assert rms_of_few(x, torch.nn.Parameter(torch.ones(7)), 1e-6) is None
        assert rms_of_few(x, torch.nn.Parameter(torch.ones(16))[::2], 1e-6) is None
