"""Decisions that the C++ code makes on the host, from sizes alone (csrc/cuda/plan.h)."""

from __future__ import annotations

import pytest

from bench.tools import sanitize
from tests.ops.cases import CUDA
from variator_kernels import cuda_support, extension

H200 = 132


@pytest.fixture
def plan():
    if extension.load("cuda") is None:
        pytest.skip(f"no CUDA kernels: {CUDA.detail}")
    return extension.load("cuda")


@pytest.mark.parametrize(
    ("k", "d", "blocks"),
    [(2, 8, 1), (4, 256, 1), (4, 512, 2), (4, 768, 3), (4, 1024, 4), (4, 1032, 0), (5, 256, 0)],
)
def test_rows_in_registers(plan, k, d, blocks):
    assert plan.resident_blocks(k, d) == blocks


def test_tiles(plan):
    assert [plan.tiles(groups) for groups in (0, 1, 8, 9)] == [0, 1, 1, 2]


def test_columns_of_few_groups_are_split(plan):
    assert plan.blocks_a_part(4096, 768, H200) == 24
    assert plan.blocks_a_part(128, 768, H200) == 4
    assert plan.blocks_a_part(8, 768, H200) == 4  # no part below 4 blocks
    assert plan.blocks_a_part(8, 24, H200) == 1
    assert plan.blocks_a_part(0, 768, H200) == 4


def test_the_second_product_is_split(plan):
    assert plan.splits(128, 768, 3072, H200) == 5
    assert plan.splits(1024, 768, 3072, H200) == 1
    assert plan.splits(1, 768, 256, H200) == 1  # every part has 256 columns of f
    assert plan.splits(0, 768, 8, H200) == 1


def test_blocks_of_one_launch(plan):
    assert plan.one_launch_blocks(128, 768, 3072, 5, H200) == 120
    assert plan.one_launch_blocks(1024, 768, 3072, 1, H200) == H200
    assert plan.one_launch_blocks(1, 8, 8, 1, H200) == 1


def test_parts_of_a_weights_gradient(plan):
    assert plan.outer_parts(4096, 64, 768, H200) == 44
    assert plan.outer_parts(64, 64, 768, H200) == 1
    assert plan.outer_parts(0, 1, 8, H200) == 1


def test_the_large_tile_needs_enough_rows(plan):
    # T5-base, 32 x 512 tokens, k = 4: 512 and 128 large tiles fill 132 multiprocessors.
    assert plan.large_product_tile(4096, 3072, H200)
    assert plan.large_product_tile(4096, 768, H200)
    assert not plan.large_product_tile(1024, 768, H200)
    assert not plan.large_product_tile(64, 768, H200)


def test_the_sanitizer_meets_every_kernel(plan):
    kernels = {plan.resident_blocks(k, d) for d, k, _ in sanitize.SIZES}
    assert kernels == {0, 1, 2, 3, 4}
    assert plan.large_product_tile(*sanitize.LARGE_PRODUCT[:2], H200)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), "80;90a-real", True),
        ((9, 0), "90a-real", True),
        ((10, 0), "90a-real", False),
        ((10, 0), "80;90a-real", True),  # by PTX
        ((8, 6), "80-real", True),
        ((8, 0), "86-real", False),
        ((9, 0), "80-real", False),
        ((7, 5), "80;90a-real", False),
        ((12, 0), "120-virtual", True),
        ((10, 3), "100f-real", True),
        ((10, 3), "100a-real", False),
        ((12, 0), "100f-virtual", False),
    ],
)
def test_which_gpus_an_architecture_fits(capability, architectures, runs):
    assert cuda_support.runs_on(capability, architectures) is runs
