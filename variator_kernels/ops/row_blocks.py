"""How many rows a packed product takes at once: of a few sizes only.

oneDNN compiles a product for each number of rows, which takes tens of milliseconds and one to two
MiB that PyTorch keeps. A server that sees thousands of lengths would pay that for each of them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

SIZES = (
    *(1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256),
    *(320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048),
)
"""Steps of an eighth to a quarter; small products are bound by reading the weights, whatever their
rows. The inner activations of the largest (f numbers a row) stay in the last-level cache."""
KEPT_SIZES = tuple(
    sorted(
        {*SIZES, 40, 72} | {size + more for size in (128, 256, 512, 1024, 2048) for more in (8, 16)}
    )
)
"""Where tokens stay whole, a batch of 8 or 16 rows has as many groups more: a size for each."""
READING = 64
"""Starting one more product costs about as much as this many rows: it reads the weights again."""


class Block(NamedTuple):
    """``rows`` rows from ``first`` on, in a product of ``size`` rows."""

    first: int
    rows: int
    size: int


@functools.lru_cache(maxsize=4096)
def blocks(rows: int, kept: bool = False) -> tuple[Block, ...]:
    """Covers ``rows`` at the least cost: 0 to many of the largest size, then one or two.

    ``kept``: some are tokens that stay whole.
    """
    sizes = KEPT_SIZES if kept else SIZES
    largest = sizes[-1]

    def fitting(count: int) -> int:
        return min(size for size in sizes if size >= count)

    whole, rest = divmod(rows, largest)
    found = [Block(i * largest, largest, largest) for i in range(whole)]
    if rest:
        first, last = whole * largest, max(size for size in sizes if size <= rest)
        if last < rest and last + fitting(rest - last) + READING < fitting(rest):
            found.append(Block(first, last, last))
            first, rest = first + last, rest - last
        found.append(Block(first, rest, fitting(rest)))
    return tuple(found)
