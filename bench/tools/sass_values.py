"""Registers and predicates of a warp, and how instructions name them.

A value that is not known (it depends on memory or on floating-point arithmetic) is marked so, lane
by lane, and makes what depends on it unknown.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 32
UNIFORM, UNIFORM_PREDICATES = 256, 8
Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]
Value = tuple[Any, Flags]  # words or flags, and of which lanes they are known
Read = Callable[["State"], Value]
LOW = np.uint64(0xFFFFFFFF)
TRUE = np.ones(LANES, dtype=bool)
ZERO = np.zeros(LANES, dtype=np.uint64)


class State:
    """One warp's registers; ``constant`` is its bank of parameters, ``jumps`` that of branches."""

    def __init__(self, constant: bytes, special: dict[str, Words], jumps: bytes = b"") -> None:
        self.jumps = np.frombuffer(jumps, dtype="<u4").astype(np.uint64)
        self.words = np.zeros((2 * UNIFORM, LANES), dtype=np.uint64)
        # What nothing wrote is read only where ptxas packs predicates into its bits: 0 will do.
        self.known = np.ones((2 * UNIFORM, LANES), dtype=bool)
        self.flags = np.zeros((2 * UNIFORM_PREDICATES, LANES), dtype=bool)
        self.sure = np.zeros((2 * UNIFORM_PREDICATES, LANES), dtype=bool)
        for true in (7, UNIFORM_PREDICATES + 7):
            self.flags[true] = self.sure[true] = True
        self.constant, self.special = constant, special

    def write(self, register: int, value: Any, known: Any, mask: Flags) -> None:
        if register % UNIFORM != 255:
            np.copyto(self.words[register], value & LOW, where=mask)
            np.copyto(self.known[register], known, where=mask)

    def write_flag(self, predicate: int, value: Any, known: Any, mask: Flags) -> None:
        if predicate % UNIFORM_PREDICATES != 7:
            np.copyto(self.flags[predicate], value, where=mask)
            np.copyto(self.sure[predicate], known, where=mask)


def register(text: str) -> int:
    """The number of ``R12`` or ``UR4``."""
    found = re.match(r"(U?)R(Z|\d+)", text)
    if found is None:
        raise ValueError(f"not a register: {text}")
    number = 255 if found[2] == "Z" else int(found[2])
    return number + UNIFORM * bool(found[1])


def predicate(text: str) -> int:
    found = re.fullmatch(r"!?(U?)P(T|\d)", text)
    if found is None:
        raise ValueError(f"not a predicate: {text}")
    return (7 if found[2] == "T" else int(found[2])) + UNIFORM_PREDICATES * bool(found[1])


def is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(T|\d)", text) is not None


def flag(text: str) -> Read:
    number, inverted = predicate(text), text.startswith("!")
    return lambda s: (s.flags[number] ^ inverted, s.sure[number])


def constant_at(text: str) -> int | None:
    found = re.match(r"c\[0x[0-9a-f]+\]\[(0x[0-9a-f]+)\]", text)
    return int(found[1], 16) if found else None


def _constant_word(at: int) -> Read:
    def read(s: State) -> Value:
        number = int.from_bytes(s.constant[at : at + 4], "little")
        return np.full(LANES, number, dtype=np.uint64), TRUE

    return read


def _register_word(number: int, part: int) -> Read:
    if number % UNIFORM == 255:
        return lambda s: (ZERO, TRUE)
    return lambda s: (s.words[number + part], s.known[number + part])


def word(text: str, part: int = 0, carry: bool = False) -> Read:
    """A 32-bit operand, or the ``part``-th word of a wide one. ``carry``: a negated one keeps the
    bit that the negation carries out, as a sum with it would."""
    sign, bare = (text[0], text[1:]) if text[0] in "-~" else ("", text)
    if re.match(r"0x[0-9a-f]+$", bare):
        number = int(bare, 16)
        if sign:
            number = -number if sign == "-" else ~number
        value = np.full(LANES, (number >> (32 * part)) & 0xFFFFFFFF, dtype=np.uint64)
        return lambda s: (value, TRUE)
    at = constant_at(bare)
    plain = _register_word(register(bare), part) if at is None else _constant_word(at + 4 * part)
    if not sign:
        return plain
    more = np.uint64(sign == "-")

    def changed(s: State) -> Value:
        value, known = plain(s)
        value = (value ^ LOW) + more
        return (value if carry else value & LOW), known

    return changed


def wide(text: str) -> Read:
    """A 64-bit operand."""
    low, high = word(text), word(text, 1)

    def read(s: State) -> Value:
        (a, known_a), (b, known_b) = low(s), high(s)
        return a | b << np.uint64(32), known_a & known_b

    return read


def signed(value: Words) -> NDArray[np.int64]:
    return value.astype(np.uint32).view(np.int32).astype(np.int64)


# What an instruction does, for the lanes of a mask.
Run = Callable[[State, Flags], None]
