"""A thread block's way through machine code: what is computed, counted and refused."""

from __future__ import annotations

import numpy as np
import pytest

from bench.tools import sass_walk
from bench.tools.sass_integers import integer_operation
from bench.tools.sass_values import LANES, TRUE, State
from tests.bench.sass_text import code, count

LOOP = """
    MOV R1, c[0x0][0x210]
    IADD3 R1, R1, -0x1, RZ
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    ISETP.NE.AND P0, PT, R1, RZ, PT
    @P0 BRA 0x10
    EXIT
    BRA 0x60
"""


def test_a_loop_runs_as_often_as_its_bound_says():
    for trips in (1, 7):
        found = count(LOOP, trips, threads=64)
        assert found.slots == 2 * (2 + 4 * trips) and found.flops == 2 * trips * 2 * 16 * 8 * 16


def test_lanes_part_and_meet_again():
    text = """
        S2R R0, SR_TID.X
        ISETP.GE.AND P0, PT, R0, 0x{:x}, PT
        @P0 BRA 0x40
        FADD R1, R1, R1
        FADD R1, R1, R1
        EXIT
    """
    assert count(text.format(0)).slots == 5  # all jump
    assert count(text.format(32)).slots == 6  # none does
    assert count(text.format(5)).slots == 6  # both ways, and one end


def test_a_branch_on_what_memory_holds_goes_both_ways_and_a_loop_on_it_ends():
    forward = """
        LDG.E R0, desc[UR4][R2.64]
        ISETP.NE.AND P0, PT, R0, RZ, PT
        @P0 BRA 0x50
        FADD R1, R1, R1
        FADD R1, R1, R1
        EXIT
    """
    assert count(forward).slots == 6
    backward = """
        LDG.E R0, desc[UR4][R2.64]
        ISETP.NE.AND P0, PT, R0, RZ, PT
        @P0 BRA 0x0
        EXIT
    """
    assert count(backward).slots == 4


@pytest.mark.parametrize(
    ("width", "stride", "steps"),
    [("", 4, 1), ("", 8, 2), ("", 128, 32), ("", 0, 1), (".64", 8, 2), (".64", 16, 4),
     (".128", 16, 4), (".128", 32, 8), (".128", 48, 4)],
)  # fmt: skip
def test_bank_conflicts(width, stride, steps):
    text = f"""
        S2R R0, SR_TID.X
        IMAD R0, R0, 0x{stride:x}, RZ
        LDS{width} R4, [R0+0x100]
        EXIT
    """
    assert count(text).shared == steps


def test_integers_pass_through_shared_memory():
    text = """
        MOV R1, c[0x0][0x210]
        MOV R0, RZ
        STS [R0+0x40], R1
        BAR.SYNC 0x0
        LDS R2, [R0+0x40]
        IADD3 R2, R2, -0x1, RZ
        ISETP.NE.AND P0, PT, R2, RZ, PT
        @P0 BRA 0x50
        EXIT
    """
    assert count(text, 9, threads=64).slots == 2 * (5 + 3 * 9 + 1)


def test_addresses_of_shared_memory_have_32_bits():
    """Compilers count back from a register, and from one that stands below 0."""
    text = """
        MOV R0, 0x{:x}
        MOV R1, 0x3
        STS [R0+{}], R1
        MOV R2, RZ
        LDS R2, [RZ+0x10]
        ISETP.EQ.AND P0, PT, R2, 0x3, PT
        @P0 BRA 0x80
        FADD R1, R1, R1
        EXIT
    """
    for base, offset in ((0x20, "-0x10"), (0xFFFFFFF0, "0x20"), (0x10, "0x0")):
        assert count(text.format(base, offset)).slots == 8
    assert count(text.format(0x20, "-0x8")).slots == 9


def test_predicates_in_the_bits_of_a_register_that_nothing_wrote():
    text = """
        S2R R0, SR_TID.X
        ISETP.GE.AND P0, PT, R0, 0x10, PT
        LOP3.LUT R9, R9, 0xfffffffd, RZ, 0xc0, !PT
        @P0 LOP3.LUT R9, R9, 0x2, RZ, 0xfc, !PT
        LOP3.LUT P1, RZ, R9, 0x2, RZ, 0xc0, !PT
        @P1 EXIT
        NOP
        EXIT
    """
    assert count(text.replace("0x10,", "0x20,")).slots == 8
    assert count(text.replace("0x10,", "0x0,")).slots == 6


def test_sectors_of_global_memory():
    text = """
        S2R R0, SR_TID.X
        IMAD.WIDE.U32 R2, R0, 0x{:x}, RZ
        LDG.E.128 R4, desc[UR4][R2.64]
        EXIT
    """
    assert count(text.format(16)).cached == 4
    assert count(text.format(64)).cached == 8


def test_what_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(sass_walk, "LIMIT", 100)
    with pytest.raises(ValueError, match="TEXMAGIC at 0x0 is not known"):
        count("TEXMAGIC R0, R1\nEXIT")
    with pytest.raises(ValueError, match="a warp does not end"):
        count("BRA 0x0\nEXIT")


A, B, C = 0x89ABCDEF, 0xF1234567, 0x13579BDF
SIGNED = {n: n - (1 << 32) for n in (A, B)}


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("IADD3 R9, R1, R2, R3", A + B + C),
        ("IADD3 R9, R1, -R2, RZ", A - B),
        ("VIADD R9, R1, 0xffffffff", A - 1),
        ("LEA R9, R1, R2, 0x3", (A << 3) + B),
        ("LEA.HI R9, R1, R2, R3, 0x5", (((C << 32 | A) << 5) >> 32) + B),
        ("LEA.HI.SX32 R9, R1, R2, 0x5", ((SIGNED[A] << 5) >> 32) + B),
        ("IMAD R9, R1, R2, R3", A * B + C),
        ("IMAD.HI.U32 R9, R1, R2, RZ", A * B >> 32),
        ("IMAD.HI R9, R1, R2, RZ", SIGNED[A] * SIGNED[B] >> 32),
        ("LOP3.LUT R9, R1, R2, R3, 0xc0, !PT", A & B),
        ("LOP3.LUT R9, R1, R2, R3, 0x96, !PT", A ^ B ^ C),
        ("LOP3.LUT R9, RZ, R1, RZ, 0x33, !PT", ~A),
        ("SHF.R.S32.HI R9, RZ, 0x4, R1", SIGNED[A] >> 4),
        ("SHF.R.U64 R9, R1, 0x8, R2", (B << 32 | A) >> 8),
        ("SHF.L.U64.HI R9, R1, 0x8, R2", ((B << 32 | A) << 8) >> 32),
        ("PRMT R9, R1, 0x7610, R2", (B & 0xFFFF0000) | (A & 0xFFFF)),
        ("PRMT R9, R1, 0x9, R2", 0xEFEFEFFF),
        ("VIMNMX R9, R1, R3, PT", A),
        ("VIMNMX.U32 R9, R1, R3, PT", C),
        ("SEL R9, R1, R2, !PT", B),
        ("SGXT R9, R1, 0x8", 0xFFFFFFEF),
        ("IABS R9, R1", -SIGNED[A]),
        ("POPC R9, R1", A.bit_count()),
        ("FLO.U32 R9, R3", 28),
        ("FLO.U32 R9, RZ", -1),
    ],
)
def test_integer_instructions(text, result):
    state = State(b"", {})
    for register, value in ((1, A), (2, B), (3, C)):
        state.write(register, np.full(LANES, value, dtype=np.uint64), True, TRUE)
    (instruction,) = code(text)
    integer_operation(instruction)(state, TRUE)
    assert state.known[9].all()
    assert {int(v) for v in state.words[9]} == {result & 0xFFFFFFFF}


def test_sixty_four_bits_by_carries():
    """A sum, a difference and a comparison of wide numbers, by their words."""
    text = """
        IADD3 R9, P0, R1, R2, RZ
        IADD3.X R10, R3, RZ, RZ, P0, !PT
        IADD3 R11, P1, R1, -R2, RZ
        IADD3.X R12, R3, ~RZ, RZ, P1, !PT
        ISETP.GE.U32.AND P2, PT, R1, R2, PT
        ISETP.GE.AND.EX P2, PT, R3, R3, PT, P2
    """
    state = State(b"", {})
    for register, value in ((1, A), (2, B), (3, C)):
        state.write(register, np.full(LANES, value, dtype=np.uint64), True, TRUE)
    for instruction in code(text):
        integer_operation(instruction)(state, TRUE)
    low, high = (int(state.words[n][0]) for n in (9, 10))
    assert high << 32 | low == (C << 32 | A) + B
    low, high = (int(state.words[n][0]) for n in (11, 12))
    assert high << 32 | low == (C << 32 | A) - B
    assert not state.flags[2].any() and state.sure[2].all()  # A < B, C == C


def test_a_division_of_integers():
    """As the compiler writes one: by a float's reciprocal and two corrections."""
    text = """
        I2F.U32.RP R5, R2
        MUFU.RCP R5, R5
        IADD3 R6, R5, 0xffffffe, RZ
        F2I.FTZ.U32.TRUNC.NTZ R7, R6
        MOV R6, RZ
        IADD3 R8, RZ, -R7, RZ
        IMAD R8, R8, R2, RZ
        IMAD.HI.U32 R7, R7, R8, R6
        IMAD.HI.U32 R7, R7, R1, RZ
        IADD3 R8, -R7, RZ, RZ
        IMAD R8, R2, R8, R1
        ISETP.GE.U32.AND P1, PT, R8, R2, PT
        @P1 IADD3 R8, R8, -R2, RZ
        @P1 IADD3 R7, R7, 0x1, RZ
        ISETP.GE.U32.AND P2, PT, R8, R2, PT
        @P2 IADD3 R7, R7, 0x1, RZ
    """
    for a, b in ((4095, 128), (127, 128), (123456789, 7), (A, 3), (5, 5)):
        state = State(b"", {})
        for register, value in ((1, a), (2, b)):
            state.write(register, np.full(LANES, value, dtype=np.uint64), True, TRUE)
        for i in code(text):
            mask = state.flags[int(i.guard[1:])] if i.guard else TRUE
            integer_operation(i)(state, mask)
        assert int(state.words[7][0]) == a // b


@pytest.mark.parametrize("uniform", ["", "U"])
def test_predicates_that_are_kept_in_a_word(uniform):
    """The second of them decides whether the branch is taken; whether any lanes part shows that it
    is known."""
    text = f"""
        MOV R1, c[0x0][0x210]
        R2UR UR1, R1
        {uniform}ISETP.NE.AND {uniform}P1, PT, {uniform}R1, {uniform}RZ, PT
        {uniform}P2{uniform}R {uniform}R4, {uniform}PR, {uniform}RZ, 0x2
        MOV R5, {uniform}R4
        ISETP.EQ.AND P2, PT, R5, 0x2, PT
        @P2 BRA 0x80
        NOP
        EXIT
    """
    assert count(text, 3).slots == 8 and count(text, 0).slots == 9


def test_what_a_warp_reduces_is_unknown():
    text = """
        REDUX.OR UR4, R2
        MOV R1, UR4
        ISETP.NE.AND P0, PT, R1, RZ, PT
        @P0 BRA 0x60
        FADD R2, R2, R2
        FADD R2, R2, R2
        EXIT
    """
    assert count(text).slots == 7  # both ways
