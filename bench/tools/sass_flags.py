"""Comparisons, and what else a warp's predicates come from and decide."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.tools.sass import Instruction
from bench.tools.sass_values import (
    LANES,
    TRUE,
    UNIFORM_PREDICATES,
    Flags,
    Run,
    State,
    flag,
    is_predicate,
    predicate,
    register,
    signed,
    word,
)


def select(i: Instruction) -> Run:
    target, a, b = register(i.operands[0]), word(i.operands[1]), word(i.operands[2])
    chosen = flag(i.operands[3])

    def run(s: State, mask: Flags) -> None:
        (x, kx), (y, ky), (p, kp) = a(s), b(s), chosen(s)
        s.write(target, np.where(p, x, y), np.where(p, kx, ky) & kp, mask)

    return run


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "GE": np.greater_equal, "GT": np.greater, "LE": np.less_equal, "LT": np.less,
    "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip


def _combine(kind: str, a: Any, b: Any) -> tuple[Any, Any]:
    """Two flags with what is known of them: a known false decides AND, a known true OR."""
    (x, kx), (y, ky) = a, b
    if kind == "AND":
        return x & y, kx & ky | kx & ~x | ky & ~y
    if kind == "OR":
        return x | y, kx & ky | kx & x | ky & y
    return x ^ y, kx & ky


def compare(i: Instruction) -> Run:
    how = next(m for m in i.modifiers if m in COMPARE)
    kind = next(m for m in i.modifiers if m in ("AND", "OR", "XOR"))
    unsigned, extends = "U32" in i.modifiers, "EX" in i.modifiers
    first, second = predicate(i.operands[0]), predicate(i.operands[1])
    a, b, also = word(i.operands[2]), word(i.operands[3]), flag(i.operands[4])
    lower = flag(i.operands[5]) if extends else None

    def run(s: State, mask: Flags) -> None:
        (x, kx), (y, ky) = a(s), b(s)
        p, q = (x, y) if unsigned else (signed(x), signed(y))
        result, known = COMPARE[how](p, q), kx & ky
        if lower:  # of 64 bits: where the upper words are equal the lower ones decide
            v, k = lower(s)
            result, known = np.where(x == y, v, COMPARE[how](p, q)), known & (k | (x != y))
        for target, value in ((first, result), (second, ~result)):
            s.write_flag(target, *_combine(kind, (value, known), also(s)), mask)

    return run


def logic_flags(i: Instruction) -> Run:
    targets = [predicate(text) for text in i.operands[:2]]
    a, b, c = (flag(text) for text in i.operands[2:5])
    tables = [int(text, 16) for text in i.operands[5:7]]

    def run(s: State, mask: Flags) -> None:
        (x, kx), (y, ky), (z, kz) = a(s), b(s), c(s)
        for target, table in zip(targets, tables, strict=True):
            value = np.zeros(LANES, dtype=bool)
            for n in range(8):
                if table >> n & 1:
                    value |= (x == bool(n & 4)) & (y == bool(n & 2)) & (z == bool(n & 1))
            known = kx & ky & kz
            s.write_flag(target, value, known, mask)

    return run


def flags_to_word(i: Instruction) -> Run:
    byte = next((int(m[1]) for m in i.modifiers if re.fullmatch(r"B\d", m)), 0)
    target, before, chosen = register(i.operands[0]), word(i.operands[2]), int(i.operands[3], 16)
    first = UNIFORM_PREDICATES if i.operands[1] == "UPR" else 0

    def run(s: State, mask: Flags) -> None:
        value, known = before(s)
        value = value & ~np.uint64(chosen << 8 * byte)
        for n in range(7):
            if chosen >> n & 1:
                bit = s.flags[first + n].astype(np.uint64)
                value = value | bit << np.uint64(n + 8 * byte)
                known = known & s.sure[first + n]
        s.write(target, value, known, mask)

    return run


def word_to_flags(i: Instruction) -> Run:
    bare, _, part = i.operands[1].partition(".")
    source, chosen, byte = word(bare), int(i.operands[2], 16), int(part[1:]) if part else 0

    def run(s: State, mask: Flags) -> None:
        value, known = source(s)
        for n in range(7):
            if chosen >> n & 1:
                s.write_flag(n, (value >> np.uint64(n + 8 * byte) & np.uint64(1)) != 0, known, mask)

    return run


def vote(i: Instruction) -> Run:
    """What the lanes that take part have of a predicate: any, all, or a bit each."""
    *targets, source = i.operands
    read, every = flag(source), "ALL" in i.modifiers

    def run(s: State, mask: Flags) -> None:
        value, sure = read(s)
        known = bool(sure[mask].all())
        bits = np.uint64(int(np.packbits(value & mask, bitorder="little").view(np.uint32)[0]))
        result = bool(value[mask].all() if every else value[mask].any())
        for text in targets:
            to = TRUE if text.startswith("U") else mask
            if is_predicate(text):
                s.write_flag(predicate(text), result, known, to)
            else:
                s.write(register(text), bits, known, to)

    return run
