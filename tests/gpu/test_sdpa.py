"""What ``auto`` takes for attention over merged keys on a GPU: PyTorch's fused attention."""

from __future__ import annotations

import pytest
import torch

from tests.ops import test_grouped_attention_sdpa as cases
from variator_kernels import functional as vf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", [*cases.SHAPES, (4, 512, 128, 12, 12, 64)])
def test_auto_is_what_the_reference_is(shape, dtype):
    q, k, v, bias = (tensor.cuda() for tensor in cases.inputs(shape, dtype))
    wanted = cases.exact(q, k, v, bias, 0.125)
    found = vf.grouped_attention(q, k, v, bias=bias, scale=0.125)
    plain = vf.grouped_attention(q, k, v, bias=bias, scale=0.125, backend="reference")
    allowed = 2 * (plain.double() - wanted).abs().max() + 1e-6
    assert (found.double() - wanted).abs().max() <= allowed
