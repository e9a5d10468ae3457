"""Decisions that the C++ code makes on the host, from sizes alone (csrc/cuda/heuristics.h)."""

from __future__ import annotations

import pytest

from bench.tools import sanitize
from tests.ops.cases import CUDA
from variator_kernels import cuda_support, extension
from variator_kernels.ops.compressed_ffn import cuda as sublayer

H200 = 132


@pytest.fixture
def heuristics():
    if extension.load("cuda") is None:
        pytest.skip(f"no CUDA kernels: {CUDA.detail}")
    return extension.load("cuda")


@pytest.mark.parametrize(
    ("d", "blocks"), [(8, 1), (256, 1), (264, 2), (512, 2), (768, 3), (1024, 4), (1032, 0)]
)
def test_rows_in_registers(heuristics, d, blocks):
    assert heuristics.resident_blocks(d) == blocks


def test_tiles(heuristics):
    assert [heuristics.tiles(groups) for groups in (0, 1, 8, 9)] == [0, 1, 1, 2]


def test_columns_of_few_groups_are_split(heuristics):
    assert heuristics.blocks_a_part(4096, 768, H200) == 24
    assert heuristics.blocks_a_part(128, 768, H200) == 4
    assert heuristics.blocks_a_part(8, 768, H200) == 4  # no part below 4 blocks
    assert heuristics.blocks_a_part(8, 24, H200) == 1
    assert heuristics.blocks_a_part(0, 768, H200) == 4


def test_the_down_projection_is_split(heuristics):
    assert heuristics.splits(128, 768, 3072, H200) == 5
    assert heuristics.splits(1024, 768, 3072, H200) == 1
    assert heuristics.splits(1, 768, 256, H200) == 1  # every part has 256 columns of f
    assert heuristics.splits(0, 768, 8, H200) == 1


def test_blocks_of_one_launch(heuristics):
    assert heuristics.one_launch_blocks(128, 768, 3072, 5, H200) == 120
    assert heuristics.one_launch_blocks(1024, 768, 3072, 1, H200) == H200
    assert heuristics.one_launch_blocks(1, 8, 8, 1, H200) == 1


@pytest.mark.parametrize(
    ("columns", "tiles"), [(1, 1), (68, 9), (72, 9), (73, 5), (96, 6), (130, 9), (544, 9)]
)
def test_left_columns_of_a_weights_gradient(heuristics, columns, tiles):
    """Of pieces of at most 72 columns none is much smaller than the others."""
    assert heuristics.gradient_tiles_a_piece(columns) == tiles
    assert 0 <= -(-columns // 72) * tiles - -(-columns // 8) < -(-columns // 72)


def test_shares_of_a_weights_gradient(heuristics):
    assert heuristics.gradient_shares(4096, 68, 768, 4, H200) == 5  # 120 thread blocks
    assert heuristics.gradient_shares(4096, 64, 768, 1, H200) == 22
    assert heuristics.gradient_shares(2048, 68, 4096, 4, H200) == 1
    assert heuristics.gradient_shares(512, 96, 768, 32, H200) == 1
    assert heuristics.gradient_shares(128, 64, 768, 1, H200) == 1
    assert heuristics.gradient_shares(0, 1, 8, 1, H200) == 1


def test_a_products_tile(heuristics):
    """The one whose rounds of 132 tiles take the fewest clocks: 96, 208 and 256 a tile and step."""
    wanted = {
        # T5-base, 32 x 512 tokens, k = 4: 3 rounds of 256, not 4 of 208; 1 of 208, not 3 of 96.
        (4096, 3072): (128, 256), (4096, 768): (128, 192),
        # T5-large: 128 tiles of 256 columns in one round.
        (4096, 4096): (128, 256), (4096, 1024): (128, 256),
        # 11 tiles of 128 rows are 12 in clusters of two: 144 of 256 columns, two rounds.
        (1408, 3072): (64, 128),
        # k = 8 and 16: two rounds and one of small tiles.
        (2048, 768): (64, 128), (1024, 768): (64, 128), (64, 768): (64, 128), (1, 8): (64, 128),
    }  # fmt: skip
    for (rows, columns), tile in wanted.items():
        assert heuristics.gemm_tile(rows, columns, H200) == tile, (rows, columns)


def test_the_sanitizer_meets_every_kernel(heuristics):
    kernels = {heuristics.resident_blocks(d) for d, _, _ in sanitize.SIZES}
    assert kernels == {0, 1, 2, 3, 4}
    tiles = [heuristics.gemm_tile(*product[:2], H200) for product in sanitize.PRODUCTS]
    assert tiles == [(64, 128), (128, 192), (128, 256)]


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
        ((12, 0), "80;90a-real", True),  # by PTX
        ((10, 0), "80-real;90a-real", False),
        ((10, 3), "90a-real;100-real;120-real", True),
        ((12, 1), "90a-real;100-real;120-real", True),
        ((11, 0), "90a-real;100-real;120-real", False),
    ],
)
def test_which_gpus_an_architecture_fits(capability, architectures, runs):
    assert cuda_support.runs_on(capability, architectures) is runs


@pytest.mark.parametrize(
    "d, f, products, groups",
    [(768, 3072, 2, 256), (1024, 4096, 2, 192), (4096, 11008, 3, 64)],
    ids=["t5-base", "t5-large", "llama-7b"],
)
def test_few_groups_are_one_launch(d, f, products, groups):
    """The larger the weights that each tile reads again, the fewer tiles; the first always is."""
    assert sublayer.one_launch_groups(d, f, products, H200) == groups
    assert sublayer.one_launch_groups(d, f, products, 20) <= groups
