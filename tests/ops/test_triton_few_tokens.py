"""Few tokens start many programs: merge and decompress have smaller tiles where multiprocessors
would idle. Grids are read off the launches; nothing runs."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.cases import TRITON
from variator_kernels.ops.arguments import AdapterWeights, MergeWeights, Norm
from variator_kernels.ops.gpu_arguments import DecompressInputs, gpu_groups
from variator_kernels.ops.make_groups import make_groups

pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"no Triton kernels: {TRITON.detail}")
PROCESSORS = 132  # of an H100
D, R = 768, 64  # T5-base
LAST_FEW = 64 * (PROCESSORS - 1)  # tokens; one more, and a usual tile for every multiprocessor


@pytest.fixture
def programs(monkeypatch):
    """How many programs the merge and decompress of ``rows x n`` tokens start on an H100."""
    from variator_kernels.ops.adapter_decompress import triton as decompress
    from variator_kernels.ops.group_merge import triton as merge
    from variator_kernels.triton_kernels import launch

    monkeypatch.setattr(launch, "arch", lambda x: "sm_90")
    monkeypatch.setattr(launch, "processors", lambda x: PROCESSORS)

    def make(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def count(k, rows, n):
        x = make(rows, n, D)
        groups = gpu_groups(make_groups(x, k, backend="triton"), x)
        weights = MergeWeights(make(k, k * D), make(k), make(R, D))
        merged = merge.launches(x.view(-1, D), groups, weights, Norm("rms", make(D), None, 1e-6))
        inputs = DecompressInputs(make(groups.total, D), make(rows * n, R, dtype=torch.float32))
        adapter = AdapterWeights(make(R, D), make(R), make(D, R), make(D), "identity")
        spread = decompress.launches(inputs, groups, adapter, x.view(-1, D))
        return math.prod(merged.merge.grid), math.prod(spread.grid)

    return count


@pytest.mark.parametrize("k", [2, 4, 8, 16, 32])
def test_128_tokens_start_more_than_a_few(programs, k):
    """Two, once: the usual tile of 64 tokens, and all columns of them."""
    merged, spread = programs(k, 1, 128)
    assert merged >= 8, merged
    assert spread >= 8, spread


@pytest.mark.parametrize("k", [4, 16])
def test_grids_grow_until_the_usual_tiles_fill_the_processors(programs, k):
    before = 0
    for tokens in [*range(64, LAST_FEW, 320), LAST_FEW]:
        merged, spread = programs(k, 1, tokens)
        assert merged > before, f"{tokens} tokens: {merged} programs"
        # Columns are shared out in whole blocks, which may leave half of the processors without.
        assert spread >= min(PROCESSORS / 2, tokens / 16 * D / 64), f"{tokens} tokens: {spread}"
        before = merged
    assert merged >= PROCESSORS and spread >= PROCESSORS


@pytest.mark.parametrize("k", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("rows", [1, 16])
def test_the_usual_tiles_fill_the_processors_from_their_first_size_on(programs, k, rows):
    """From there on they take over, with fewer and larger programs."""
    last, first = LAST_FEW // rows, -(-(LAST_FEW + 1) // rows)
    few, many = programs(k, rows, last), programs(k, rows, first)
    for before, after in zip(few, many, strict=True):
        assert PROCESSORS <= after < before
    for now, later in zip(many, programs(k, rows, 2 * first), strict=True):
        assert later > now
