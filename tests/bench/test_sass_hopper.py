"""What a walk makes of Hopper's own instructions: products from shared memory, copies, waits."""

from __future__ import annotations

import struct

import pytest

from bench.tools.sass_walk import Count, Launch, walk
from tests.bench.sass_text import code, count


def test_a_product_takes_its_operands_from_shared_memory():
    """[64, 16] times [16, 192] in 16 bits: 2 KiB and 6 KiB, in steps of 128 bytes."""
    both = count("HGMMA.64x192x16.F32.BF16 R24, gdesc[UR4], R24, !UPT\nEXIT", threads=128)
    assert both == Count(8.0, 2 * 64 * 192 * 16, (2048 + 6144) / 128, 0.0)
    right = count("HGMMA.64x192x16.F32.BF16 R24, R8, gdesc[UR4], R24, gsb0\nEXIT", threads=128)
    assert right == Count(8.0, 2 * 64 * 192 * 16, 6144 / 128, 0.0)
    small = count("HMMA.16816.F32.BF16 R4, R8, R12, R4\nEXIT")
    assert small == Count(2.0, 2 * 16 * 8 * 16, 0.0, 0.0)


def test_a_wait_is_over_at_once():
    """Whoever waits takes the short way, and no lanes part."""
    text = """
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3+URZ], R4
        @!P0 BRA 0x40
        BAR.SYNC.DEFER_BLOCKING 0x0
        EXIT
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3+URZ], R4
        @!P0 BRA 0x40
        BRA 0x20
    """
    assert count(text) == Count(slots=4.0)


def test_registers_are_there_when_asked_for():
    text = """
        USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8
        PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0
        @!P0 BRA 0x0
        USETMAXREG.DEALLOC.CTAPOOL 0x18
        EXIT
    """
    assert count(text) == Count(slots=5.0)


def test_an_indirect_branch_goes_where_its_table_says():
    """Words of constant bank 2; a branch counts from the instruction behind it."""
    text = """
        MOV R1, c[0x0][0x210]
        LDC R2, c[0x2][R1+0x4]
        BRX R2 -0x30
        NOP
        NOP
        EXIT
    """
    for place, slots in ((0, 5), (4, 4)):
        constants = bytes(0x210) + place.to_bytes(4, "little")
        jumps = struct.pack("<3I", 0, 0x40, 0x50)
        found = walk(Launch(code(text), 32, constants, jumps=jumps))[0]
        assert found.slots == slots
    with pytest.raises(ValueError, match="nobody knows where the branch at 0x10 goes"):
        count("LDG.E R2, desc[UR4][R4.64]\nBRX R2 -0x20\nEXIT")


def test_copies_go_through_shared_memory():
    """One lane announces how many bytes come and starts the copies."""
    text = """
        ELECT P0, URZ, PT
        MOV R4, 0xa000
        @P0 SYNCS.ARRIVE.TRANS64 RZ, [UR8+URZ], R4
        @P0 UTMALDG.2D [UR16], [UR4], desc[UR14]
        SYNCS.ARRIVE.TRANS64.RED.A1T0 RZ, [UR8+URZ], RZ
        EXIT
    """
    assert count(text).shared == 0xA000 / 128
    assert count(text.replace("0xa000", "0x100"), threads=64).shared == 2 * 0x100 / 128


@pytest.mark.parametrize(("lane", "slots"), [("RZ", 5), ("0x9", 6), ("R0", 7)])
def test_lanes_learn_what_another_one_has(lane, slots):
    """All stay, all jump, or (each has its own) lanes part."""
    text = f"""
        S2R R0, SR_TID.X
        SHFL.IDX PT, R2, R0, {lane}, 0x1f
        ISETP.GE.AND P0, PT, R2, 0x8, PT
        @P0 BRA 0x50
        EXIT
        NOP
        EXIT
    """
    assert count(text).slots == slots


@pytest.mark.parametrize(("kind", "slots"), [("ANY", 7), ("ALL", 5)])
def test_lanes_vote(kind, slots):
    """Some lanes hold the predicate; it is not lost by the vote, and the result is one for all."""
    text = f"""
        S2R R0, SR_TID.X
        ISETP.GE.AND P0, PT, R0, 0x8, PT
        VOTEU.{kind} UP0, P0
        @UP0 BRA 0x50
        EXIT
        @P0 BRA 0x70
        EXIT
        EXIT
    """
    assert count(text).slots == slots


def test_what_memory_holds_stays_unknown_behind_a_shuffle():
    text = """
        LDG.E R0, desc[UR4][R2.64]
        SHFL.IDX PT, R2, R0, RZ, 0x1f
        ISETP.NE.AND P0, PT, R2, RZ, PT
        @P0 BRA 0x60
        FADD R1, R1, R1
        FADD R1, R1, R1
        EXIT
    """
    assert count(text).slots == 7
