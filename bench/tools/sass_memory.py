"""Addresses, and shared memory as far as integers in it are known."""

import re

import numpy as np

from bench.tools.sass_values import LANES, TRUE, Flags, Read, State, Value, Words, wide, word

LINE, SECTOR, BANK = 128, 32, 4  # bytes


def address_of(text: str) -> Read:
    """``[R2.X4+UR4+-0x10]``, after ``desc[..]`` or not; of 32 bits unless a part has 64."""
    inside = re.findall(r"\[([^\]]*)\]", text)[-1]
    reads = []
    bits = np.uint64(2**64 - 1 if ".64" in inside else 2**32 - 1)
    back = np.uint64(0)
    for part in inside.split("+"):
        if part.startswith("-"):
            back += np.uint64(int(part[1:], 16))
            continue
        scale = re.search(r"\.X(\d+)", part)
        bare = part.split(".")[0]
        value = wide(bare) if ".64" in part else word(bare)
        reads.append((value, np.uint64(int(scale[1]) if scale else 1)))

    def read(s: State) -> Value:
        total, known = np.zeros(LANES, dtype=np.uint64), TRUE
        for each, scale in reads:
            value, k = each(s)
            total, known = total + value * scale, known & k
        return (total - back) & bits, known

    return read


class Memory:
    """Shared memory as far as integers in it are known; counts the steps that accesses take."""

    def __init__(self) -> None:
        self.words = np.zeros(1 << 16, dtype=np.uint64)
        self.known = np.zeros(1 << 16, dtype=bool)

    def steps(self, address: Words, mask: Flags, size: int) -> int:
        """Of one access by the lanes of ``mask``: a bank gives one word a step."""
        lanes = np.flatnonzero(mask)
        taken = 0
        for part in range(max(size // BANK, 1)):  # a quarter of a warp at a time for 16 bytes
            some = lanes[lanes * max(size // BANK, 1) // LANES == part]
            offsets = np.arange(0, max(size, BANK), BANK, dtype=np.uint64)
            words = np.unique((address[some, None] + offsets) // np.uint64(BANK))
            if len(words):
                taken += int(np.bincount((words % np.uint64(32)).astype(int)).max())
        return taken
