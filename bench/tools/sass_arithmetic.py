"""Sums, products, shifts, logic and conversions of a warp's integers."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.tools.sass import Instruction
from bench.tools.sass_values import (
    LANES,
    LOW,
    TRUE,
    ZERO,
    Flags,
    Run,
    State,
    Words,
    flag,
    is_predicate,
    predicate,
    register,
    signed,
    wide,
    word,
)


def _split(operands: tuple[str, ...]) -> tuple[list[str], list[str], list[str]]:
    """The predicates written besides the result, the operands, the predicates read."""
    rest = list(operands[1:])
    written: list[str] = []
    read: list[str] = []
    while rest and is_predicate(rest[0]):
        written.append(rest.pop(0))
    while rest and is_predicate(rest[-1]):
        read.insert(0, rest.pop())
    return written, rest, read


def add(i: Instruction) -> Run:
    """IADD3, VIADD, LEA: sums with carries in and out."""
    written, sources, read = _split(i.operands)
    target, takes_carry = register(i.operands[0]), "X" in i.modifiers
    shift = 0
    shifted_high = i.name.endswith("LEA") and "HI" in i.modifiers
    if i.name.endswith("LEA"):
        shift = int(sources.pop(), 16)
    reads = [word(text, carry=True) for text in sources]
    flags = [flag(text) for text in read] if takes_carry else []
    extends = "SX32" in i.modifiers

    def run(s: State, mask: Flags) -> None:
        values = [r(s) for r in reads]
        known = TRUE
        for _, k in values:
            known = known & k
        words = [v for v, _ in values]
        if shifted_high:  # ((c:a) << shift) >> 32, plus b
            a = words[0] & LOW
            c = (signed(a) >> 63).astype(np.uint64) if extends else words[2] & LOW
            words = [
                ((a | (c & LOW) << np.uint64(32)) << np.uint64(shift)) >> np.uint64(32),
                words[1],
            ]
        elif shift:
            words = [(words[0] << np.uint64(shift)) & LOW, *words[1:]]
        total = sum(words[1:], words[0])
        for f in flags:
            v, k = f(s)
            total, known = total + v, known & k
        s.write(target, total, known, mask)
        for n, text in enumerate(written):
            s.write_flag(predicate(text), total >> np.uint64(32) > n, known, mask)

    return run


def multiply_add(i: Instruction) -> Run:
    written, sources, read = _split(i.operands)
    target, high, is_wide = register(i.operands[0]), "HI" in i.modifiers, "WIDE" in i.modifiers
    a, b = word(sources[0]), word(sources[1])
    c = wide(sources[2]) if high or is_wide else word(sources[2], carry=True)
    unsigned = "U32" in i.modifiers
    flags = [flag(text) for text in read] if "X" in i.modifiers else []

    def run(s: State, mask: Flags) -> None:
        (x, kx), (y, ky), (z, kz) = a(s), b(s), c(s)
        known = kx & ky & kz
        if not unsigned and (high or is_wide):
            x, y = signed(x).view(np.uint64), signed(y).view(np.uint64)
        product = x * y
        total = product + z
        for f in flags:
            v, k = f(s)
            total, known = total + v, known & k
        s.write(target, total >> np.uint64(32) if high else total, known, mask)
        if is_wide:
            s.write(target + 1, total >> np.uint64(32), known, mask)
            for text in written:
                s.write_flag(predicate(text), total < product, known, mask)

    return run


def logic(i: Instruction) -> Run:
    operands = list(i.operands)
    result = operands.pop(0) if is_predicate(operands[0]) else ""
    target, table = register(operands[0]), int(operands[4], 16)
    a, b, c = (word(text) for text in operands[1:4])

    def run(s: State, mask: Flags) -> None:
        (x, kx), (y, ky), (z, kz) = a(s), b(s), c(s)
        total = np.zeros(LANES, dtype=np.uint64)
        for n in range(8):
            if table >> n & 1:
                term = (x if n & 4 else ~x) & (y if n & 2 else ~y) & (z if n & 1 else ~z)
                total |= term
        total &= LOW
        known = kx & ky & kz
        s.write(target, total, known, mask)
        if result:
            s.write_flag(predicate(result), total != 0, known, mask)

    return run


def shift(i: Instruction) -> Run:
    target, left, high = register(i.operands[0]), "L" in i.modifiers, "HI" in i.modifiers
    a, n, c = (word(text) for text in i.operands[1:4])
    arithmetic = bool({"S32", "S64"} & set(i.modifiers))

    def run(s: State, mask: Flags) -> None:
        (x, kx), (by, kb), (z, kz) = a(s), n(s), c(s)
        both, by = x | z << np.uint64(32), np.minimum(by, np.uint64(63))
        if left:
            both = both << by
        elif arithmetic:
            both = (both.view(np.int64) >> by.view(np.int64)).view(np.uint64)
        else:
            both = both >> by
        s.write(target, both >> np.uint64(32) if high else both, kx & kb & kz, mask)

    return run


def permute(i: Instruction) -> Run:
    target = register(i.operands[0])
    a, selector, c = (word(text) for text in i.operands[1:4])

    def run(s: State, mask: Flags) -> None:
        (x, kx), (which, kw), (z, kz) = a(s), selector(s), c(s)
        both, total, eight = x | z << np.uint64(32), ZERO, np.uint64(8)
        for n in range(4):
            nibble = which >> np.uint64(4 * n) & np.uint64(15)
            byte = both >> (nibble & np.uint64(7)) * eight & np.uint64(255)
            sign = (byte >> np.uint64(7)) * np.uint64(255)
            byte = np.where(nibble & eight, sign, byte)
            total = total | byte << np.uint64(8 * n)
        s.write(target, total, kx & kw & kz, mask)

    return run


def minimum(i: Instruction) -> Run:
    """VIMNMX, IMNMX, VIADDMNMX: the smaller where the predicate holds, else the larger."""
    target, sources = register(i.operands[0]), [word(text) for text in i.operands[1:-1]]
    smaller, unsigned = flag(i.operands[-1]), "U32" in i.modifiers

    def run(s: State, mask: Flags) -> None:
        *head, (y, ky) = (r(s) for r in sources)
        x, known = sum((v for v, _ in head), ZERO) & LOW, ky
        for _, k in head:
            known = known & k
        p, kp = smaller(s)
        less = x < y if unsigned else signed(x) < signed(y)
        s.write(target, np.where(less == p, x, y), known & kp, mask)

    return run


def absolute(i: Instruction) -> Run:
    target, source = register(i.operands[0]), word(i.operands[1])

    def run(s: State, mask: Flags) -> None:
        value, known = source(s)
        s.write(target, np.abs(signed(value)).astype(np.uint64), known, mask)

    return run


def extend(i: Instruction) -> Run:
    """SGXT: the lower bits, with the sign of the last of them."""
    target, source, width = register(i.operands[0]), word(i.operands[1]), word(i.operands[2])

    def run(s: State, mask: Flags) -> None:
        (value, known), (bits, also) = source(s), width(s)
        above = np.uint64(32) - bits
        value = (value << above) & LOW
        value = (
            value >> above
            if "U32" in i.modifiers
            else (signed(value) >> above.view(np.int64)).view(np.uint64)
        )
        s.write(target, value, known & also, mask)

    return run


def _float(value: Words) -> NDArray[np.float64]:
    return value.astype(np.uint32).view(np.float32).astype(np.float64)


def _bits(value: Any) -> Words:
    return np.asarray(value, dtype=np.float32).view(np.uint32).astype(np.uint64)


def convert(i: Instruction) -> Run | None:
    """The steps of a division of integers, which goes by way of a float's reciprocal."""
    target, long = register(i.operands[0]), bool({"U64", "S64"} & set(i.modifiers))
    source = wide(i.operands[1]) if long and i.name == "I2F" else word(i.operands[1])

    def run(s: State, mask: Flags) -> None:
        value, known = source(s)
        with np.errstate(all="ignore"):
            if i.name.startswith("I2F"):
                of = value if long or "U32" in i.modifiers else signed(value)
                result = _bits(of.astype(np.float64))
            elif i.name == "MUFU":
                result = _bits(1 / _float(value))
            else:
                number = np.nan_to_num(np.trunc(_float(value)), posinf=2.0**63)
                result = np.clip(number, 0, 2.0**63).astype(np.uint64)
        s.write(target, result, known, mask)
        if i.name == "F2I" and long:
            s.write(target + 1, result >> np.uint64(32), known, mask)

    return run
