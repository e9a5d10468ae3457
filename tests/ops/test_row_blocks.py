"""How many rows a packed product takes at once."""

from __future__ import annotations

import pytest

from variator_kernels.ops.row_blocks import KEPT_SIZES, SIZES, blocks


@pytest.mark.parametrize("kept", [False, True])
def test_blocks_cover_all_rows_in_known_sizes(kept):
    sizes = KEPT_SIZES if kept else SIZES
    for rows in (*range(1, 2300), 4103, 4112, 9000):
        at = 0
        for first, count, size in blocks(rows, kept):
            assert first == at and 0 < count <= size and size in sizes
            at += count
        assert at == rows


@pytest.mark.parametrize("groups", [128, 256, 512, 1024, 2048])
@pytest.mark.parametrize("rows", [8, 16])
def test_a_token_kept_in_each_row_asks_for_no_second_product(groups, rows):
    """It would read the weights again."""
    assert blocks(groups + rows, True) == ((0, groups + rows, groups + rows),)
