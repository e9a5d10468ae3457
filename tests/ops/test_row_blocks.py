"""Products take a few sizes of rows, and every row is in one of them."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import needs_cpu
from variator_kernels.ops import prepack
from variator_kernels.ops.row_blocks import KEPT_SIZES, READING, SIZES, blocks


@pytest.mark.parametrize("kept", [False, True])
def test_every_row_once(kept):
    sizes = KEPT_SIZES if kept else SIZES
    for rows in (*range(1, 2300), 4096, 4103, 4112, 5000, 65_537):
        at = 0
        for block in blocks(rows, kept):
            assert block.first == at and 0 < block.rows <= block.size in sizes
            at += block.rows
        assert at == rows


@pytest.mark.parametrize("groups", [128, 256, 512, 1024, 2048])
@pytest.mark.parametrize("rows", [8, 16])
def test_a_token_kept_in_each_row_asks_for_no_second_product(groups, rows):
    """It would read the weights again."""
    assert blocks(groups + rows, True) == ((0, groups + rows, groups + rows),)


def test_no_rows():
    assert blocks(0) == ()


def test_what_filling_up_costs():
    """In rows, where one more product counts as many as reading its weights takes."""
    costs = {
        rows: sum(block.size + READING for block in blocks(rows)) / (rows + READING)
        for rows in range(1, SIZES[-1] + 1)
    }
    assert max(costs.values()) < 1.2
    assert sum(costs.values()) / len(costs) < 1.06


@needs_cpu
@pytest.mark.parametrize("rows", [1, 3, 17, 130, 2049, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_of_any_rows(rows, dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype)
    x = torch.randn(rows, 40).to(prepack.product_dtype(dtype))
    out = prepack.linear(weight, bias)(x, "relu")
    exact = torch.relu(x.double() @ weight.double().t() + bias.double())
    assert out.shape == (rows, 24)
    error = 4e-6 if x.dtype == torch.float32 else 0.05
    torch.testing.assert_close(out.double(), exact, rtol=error, atol=error)
