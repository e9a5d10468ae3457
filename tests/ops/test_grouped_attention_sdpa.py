"""grouped_attention by PyTorch's fused attention, which ``auto`` takes on GPUs, here on a CPU."""

from __future__ import annotations

import math

import pytest
import torch

from variator_kernels.ops.grouped_attention import grouped_attention, sdpa
from variator_kernels.ops.grouped_attention.reference import Visible
from variator_kernels.ops.grouped_attention.relative import distance_bias

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 9, 7, 4, 4, 16), (3, 17, 5, 6, 2, 20), (1, 1, 1, 2, 1, 3), (2, 40, 13, 3, 3, 64)]


def inputs(shape, dtype, seed=0):
    """Queries, keys, values and a bias; some keys are invisible, and hold what is no number."""
    rows, n, groups, heads, kv_heads, size = shape
    source = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(rows, length, count, size, generator=source).to(dtype)
        for length, count in ((n, heads), (groups, kv_heads), (groups, kv_heads))
    ]
    bias = torch.randint(1, 5, (rows, groups), generator=source).double().log().float()
    hidden = torch.rand(rows, groups, generator=source) < 0.3
    bias[hidden] = -math.inf
    for tensor in made[1:]:
        tensor[hidden] = math.nan
    if rows > 2:
        bias[1], made[1][1], made[2][1] = -math.inf, math.inf, math.nan
    return (*made, bias)


def exact(q, k, v, bias, scale):
    wide = None if bias is None else bias.double()
    return grouped_attention(
        q.double(), k.double(), v.double(), bias=wide, scale=scale, backend="reference"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_is_what_the_reference_is(shape, dtype, scale):
    q, k, v, bias = inputs(shape, dtype)
    wanted = exact(q, k, v, bias, scale)
    found = sdpa.grouped_attention(q, k, v, bias, scale)
    plain = grouped_attention(q, k, v, bias=bias, scale=scale, backend="reference")
    assert found.dtype == dtype and found.shape == wanted.shape
    allowed = 2 * (plain.double() - wanted).abs().max() + 1e-6
    assert (found.double() - wanted).abs().max() <= allowed
    if shape[0] > 2:
        assert not found[1].any(), "a row that sees nothing"


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_bias(dtype):
    q, k, v, _ = inputs((2, 9, 7, 4, 2, 12), dtype)
    k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
    wanted = exact(q, k, v, None, 0.3)
    found = sdpa.grouped_attention(q, k, v, None, 0.3)
    plain = grouped_attention(q, k, v, scale=0.3, backend="reference")
    assert (found.double() - wanted).abs().max() <= 2 * (plain.double() - wanted).abs().max() + 1e-6


def test_gradients():
    q, k, v, bias = inputs((3, 17, 5, 6, 2, 20), torch.float32)
    seen = bias != -math.inf
    made = []
    for call in (
        lambda *args: sdpa.grouped_attention(*args, 0.25),
        lambda *args: grouped_attention(*args[:3], bias=args[3], scale=0.25, backend="reference"),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, bias)]
        out = call(*leaves)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        made.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*made, strict=True):
        shown = ours if ours.dim() > 2 else torch.where(seen, ours, 0)
        other = theirs if theirs.dim() > 2 else torch.where(seen, theirs, 0)
        torch.testing.assert_close(shown, other.nan_to_num(0), atol=2e-5, rtol=1e-4)


def test_what_runs_there():
    q = torch.randn(2, 5, 2, 8)
    cuda = q.to("meta")  # stands for a GPU's
    places = torch.arange(5).expand(2, -1)
    terms = distance_bias(torch.randn(32, 2), queries=places, keys=places)

    class OnGpu(torch.Tensor):
        is_cuda = True

    there = cuda.as_subclass(OnGpu)
    assert sdpa.fits(there, Visible(), None)
    assert not sdpa.fits(q, Visible(), None)
    assert not sdpa.fits(there, Visible(), terms)
    assert not sdpa.fits(there, Visible(first=torch.zeros(2, 5).int()), None)
    assert not sdpa.fits(there.double(), Visible(), None)
    assert not sdpa.fits(
        torch.empty(1, 1, 1, 300, device="meta").as_subclass(OnGpu), Visible(), None
    )
