"""What a thread block issues: its machine code walked through, warp by warp, as a GPU would.

Integers and predicates are computed, so loops run as often as they would, branches go where they
would, and addresses are known, with their bank conflicts. Floating-point values are not: what comes
from global memory is unknown, and so is what is made of it. A branch on an unknown value goes both
ways, half of the lanes each; a loop on one ends. Lanes that part join again where their ways meet.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bench.tools.sass import Instruction
from bench.tools.sass_effects import effect
from bench.tools.sass_memory import Memory
from bench.tools.sass_values import (
    LANES,
    TRUE,
    Flags,
    State,
    flag,
    is_predicate,
    word,
)

LIMIT = 1_000_000  # instructions a warp: more is a loop that never ends
TURNS = ("BRA", "EXIT", "CALL", "RET", "BRX")


class Count(NamedTuple):
    """Issue slots, FLOPs on tensor cores, and 128-byte steps between registers and shared memory,
    and between registers and L1."""

    slots: float = 0.0
    flops: float = 0.0
    shared: float = 0.0
    cached: float = 0.0


class Launch(NamedTuple):
    """A thread block: its code, how many threads, its place in the grid, its banks of constants."""

    code: list[Instruction]
    threads: int
    constant: bytes
    block: tuple[int, int, int] = (0, 0, 0)
    jumps: bytes = b""


class Warp:
    """One warp on its way; :meth:`go` yields at each barrier."""

    def __init__(self, steps: "Program", state: State, memory: Memory) -> None:
        self.program, self.state, self.memory = steps, state, memory
        self.mask, self.at = TRUE.copy(), 0
        self.apart: dict[int, Flags] = {}
        self.slots: Counter[int] = Counter()
        self.flops = self.shared = self.cached = 0.0
        self.left = LIMIT

    def go(self) -> Iterator[None]:
        program, state = self.program, self.state
        while True:
            if self.apart:
                self._meet()
            elif not self.mask.any():
                return
            here = self.at
            self.slots[here] += 1
            self.left -= 1
            if self.left < 0:
                raise ValueError("a warp does not end")
            self.at = here + 1
            guard = program.guards[here]
            mask, sure = self.mask, TRUE
            if guard is not None:
                value, sure = guard(state)
                mask = mask & (value | ~sure)
            name = program.code[here].name
            if name in TURNS:
                self._turn(program.code[here], here, mask, sure)
            elif name == "BAR":
                if self.apart:
                    raise ValueError("half of a warp waits at a barrier")
                yield
            elif guard is None or mask.any():
                program.effects[here](self, mask)

    def _meet(self) -> None:
        """Goes on with the lanes that are farthest behind, all that are at one place."""
        if self.mask.any():
            self.apart[self.at] = self.apart.get(self.at, ~TRUE) | self.mask
        self.at = min(self.apart)
        self.mask = self.apart.pop(self.at)

    def _turn(self, i: Instruction, here: int, mask: Flags, sure: Flags) -> None:
        if i.name == "EXIT":
            self.mask = self.mask & ~mask
            return
        if i.name in ("RET", "BRX"):
            register, *offset = i.operands[0].split()
            value, known = word(register)(self.state)
            if i.name == "BRX":  # counts from the next instruction
                if not known[mask].all():
                    raise ValueError(f"nobody knows where the branch at {i.at:#x} goes")
                value = value + np.uint64(int(offset[0], 16) + i.at + 16)
            target = self.program.places[int(value[mask][0])]
        else:
            target = self.program.places[int(i.operands[-1], 16)]
        if "DIV" in i.modifiers:
            return
        for extra in i.operands[:-1]:
            if is_predicate(extra):
                value, k = flag(extra)(self.state)
                mask, sure = mask & (value | ~k), sure & k
        if not sure[mask].all():  # both ways, but not round a loop for ever
            lanes = np.arange(LANES)
            mask = mask & (sure | ((lanes % 2 == 1) & (target > here)))
        if mask.any():
            self.apart[target] = self.apart.get(target, ~TRUE) | mask
            self.mask = self.mask & ~mask


class Program:
    """A kernel's code, made ready to be walked."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        self.places = {i.at: n for n, i in enumerate(code)}
        self.guards = [flag(i.guard) if i.guard else None for i in code]
        self.effects = [effect(i) for i in code]


def walk(launch: Launch) -> tuple[Count, Counter[int]]:
    """What a thread block does, and how often each instruction is issued, by address.

    Raises:
        ValueError: an instruction is not known, or the block does not end.
    """
    program, memory = Program(launch.code), Memory()
    special = {"SRZ": np.zeros(LANES, dtype=np.uint64), "SR_CgaCtaId": np.zeros(LANES, np.uint64)}
    for name, at in zip("XYZ", launch.block, strict=True):
        special[f"SR_CTAID.{name}"] = np.full(LANES, at, dtype=np.uint64)
        special[f"SR_TID.{name}"] = np.zeros(LANES, dtype=np.uint64)
    special["SR_LANEID"] = np.arange(LANES, dtype=np.uint64)
    warps = []
    for first in range(0, launch.threads, LANES):
        own = {**special, "SR_TID.X": np.arange(first, first + LANES, dtype=np.uint64)}
        warps.append(Warp(program, State(launch.constant, own, launch.jumps), memory))
    ways = [warp.go() for warp in warps]
    while ways:
        ways = [way for way in ways if next(way, "ended") != "ended"]
    slots: Counter[int] = Counter()
    for warp in warps:
        slots.update({launch.code[n].at: often for n, often in warp.slots.items()})
    sums = [sum(getattr(warp, name) for warp in warps) for name in ("flops", "shared", "cached")]
    return Count(float(slots.total()), *sums), slots
