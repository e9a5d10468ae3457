"""What each integer instruction does to a warp's registers and predicates."""

import re
from collections.abc import Callable

import numpy as np

from bench.tools import sass_arithmetic as arithmetic
from bench.tools import sass_flags as flags
from bench.tools.sass import Instruction
from bench.tools.sass_values import (
    LANES,
    ZERO,
    Flags,
    Read,
    Run,
    State,
    constant_at,
    predicate,
    register,
    word,
)


def _move(i: Instruction) -> Run:
    target, source = register(i.operands[0]), word(i.operands[1])
    return lambda s, mask: s.write(target, *source(s), mask)


def _special(i: Instruction) -> Run:
    target, name = register(i.operands[0]), i.operands[1]
    words = 2 if i.name == "CS2R" and "32" not in i.modifiers else 1

    def run(s: State, mask: Flags) -> None:
        for n in range(words):
            s.write(target + n, s.special.get(name, ZERO), name in s.special, mask)

    return run


def _jump(target: int, index: Read, offset: int) -> Run:
    """A word of the table of branches."""

    def run(s: State, mask: Flags) -> None:
        place, known = index(s)
        place = np.minimum((place + np.uint64(offset)) // np.uint64(4), np.uint64(len(s.jumps) - 1))
        s.write(target, s.jumps[place.astype(int)], known, mask)

    return run


def _constant(i: Instruction) -> Run:
    if table := re.fullmatch(r"c\[0x2\]\[(R\d+)(?:\+(0x\w+))?\]", i.operands[1]):
        return _jump(register(i.operands[0]), word(table[1]), int(table[2] or "0", 16))
    target, at = register(i.operands[0]), constant_at(i.operands[1])
    bytes_ = {"64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "128": 16}
    size = next((bytes_[m] for m in i.modifiers if m in bytes_), 4)

    def run(s: State, mask: Flags) -> None:
        for n in range(max(size // 4, 1)):
            piece = b"" if at is None else s.constant[at + 4 * n : at + 4 * n + min(size, 4)]
            number = np.full(LANES, int.from_bytes(piece, "little"), dtype=np.uint64)
            s.write(target + n, number, at is not None, mask)

    return run


def _shuffle(i: Instruction) -> Run | None:
    """What another lane has, of a whole warp; other shuffles move what nobody knows."""
    if "IDX" not in i.modifiers or i.operands[4] != "0x1f":
        return None
    target, source, lane = register(i.operands[1]), word(i.operands[2]), word(i.operands[3])

    def run(s: State, mask: Flags) -> None:
        (value, known), (which, sure) = source(s), lane(s)
        place = (which % np.uint64(LANES)).astype(int)
        s.write(target, value[place], known[place] & sure, mask)
        s.write_flag(predicate(i.operands[0]), True, True, mask)

    return run


def _bits(i: Instruction) -> Run | None:
    """How many bits are set (POPC), or which is the highest (FLO.U32; all ones if none is)."""
    if i.name.endswith("FLO") and i.modifiers != ("U32",):
        return None
    target, source = register(i.operands[0]), word(i.operands[-1])
    of = int.bit_count if i.name.endswith("POPC") else lambda n: (n.bit_length() - 1) % (1 << 32)

    def run(s: State, mask: Flags) -> None:
        value, known = source(s)
        result = np.array([of(n) for n in value.tolist()], dtype=np.uint64)
        s.write(target, result, known, mask)

    return run


OPERATIONS: dict[str, Callable[[Instruction], Run | None]] = {
    "IADD3": arithmetic.add,
    "VIADD": arithmetic.add,
    "IADD": arithmetic.add,
    "LEA": arithmetic.add,
    "IMAD": arithmetic.multiply_add,
    "MOV": _move,
    "R2UR": _move,
    "SEL": flags.select,
    "LOP3": arithmetic.logic,
    "SHF": arithmetic.shift,
    "ISETP": flags.compare,
    "PLOP3": flags.logic_flags,
    "PRMT": arithmetic.permute,
    "VIMNMX": arithmetic.minimum,
    "IMNMX": arithmetic.minimum,
    "VIADDMNMX": arithmetic.minimum,
    "S2R": _special,
    "S2UR": _special,
    "CS2R": _special,
    "LDC": _constant,
    "LDCU": _constant,
    "P2R": flags.flags_to_word,
    "UP2UR": flags.flags_to_word,
    "R2P": flags.word_to_flags,
    "IABS": arithmetic.absolute,
    "SGXT": arithmetic.extend,
    "I2F": arithmetic.convert,
    "I2FP": arithmetic.convert,
    "F2I": arithmetic.convert,
    "POPC": _bits,
    "FLO": _bits,
    "SHFL": _shuffle,
    "VOTE": flags.vote,
    "VOTEU": flags.vote,
}


def integer_operation(i: Instruction) -> Run | None:
    """What an integer instruction does, or None: it is of another kind."""
    if i.name == "MUFU" and "RCP" in i.modifiers:
        return arithmetic.convert(i)
    bare = i.name[1:] if i.name[0] == "U" else i.name
    make = OPERATIONS.get(i.name) or OPERATIONS.get(bare)
    return make(i) if make else None
