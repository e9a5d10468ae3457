"""What an instruction does besides arithmetic on integers: unknown results, products, memory."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.tools.sass import Instruction
from bench.tools.sass_integers import integer_operation
from bench.tools.sass_memory import BANK, LINE, SECTOR, address_of
from bench.tools.sass_values import (
    LANES,
    UNIFORM,
    Flags,
    Read,
    Run,
    is_predicate,
    predicate,
    register,
    word,
)

# Of a warp and the lanes that take part.
Effect = Callable[[Any, Flags], None]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Their results are unknown; nothing else happens but access to memory.
UNKNOWN = _names(
    "FADD FMUL FFMA FMNMX FSEL FSETP FRND FCHK MUFU F2F F2FP HADD2 HMUL2 HFMA2 HMNMX2 HSETP2 HMMA "
    "HGMMA SHFL LD LDG LDL LDS LDSM LDGSTS ST STG STL STS STSM ATOM ATOMG ATOMS RED REDG REDUX "
    "VOTE VOTEU"
)
# These wait, order or mark.
SILENT = _names(
    "NOP BSSY BSYNC BREAK WARPSYNC DEPBAR LDGDEPBAR MEMBAR ERRBAR CCTL WARPGROUP ENDCOLLECTIVE "
    "FENCE YIELD UTMALDG UTMASTG UTMACCTL UTMAPF UTMACMDFLUSH USETMAXREG UCGABAR_ARV UCGABAR_WAIT "
    "ACQBULK PREEXIT CGAERRBAR"
)
WIDE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
BYTES = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


def tensor_flops(i: Instruction) -> float:
    """FLOPs of one warp's product."""
    name = ".".join((i.name, *i.modifiers))
    if large := WIDE.match(name):
        m, n, k = map(int, large.groups())
        return 2 * m * n * k / 4  # four warps make it together
    if small := re.match(r"HMMA\.168(16|8|4)", name):
        return 2 * 16 * 8 * int(small[1])
    return 0.0


def operand_steps(i: Instruction) -> float:
    """Steps of shared memory by which one warp's share of a product takes its operands there: the
    right one, and the left one unless registers hold it; 32 bytes a row of either."""
    if i.name != "HGMMA":
        return 0.0
    left, right, _ = map(int, i.modifiers[0].split("x"))
    return (right + (0 if i.operands[1].startswith("R") else left)) * 32 / LINE / 4


def _elect(i: Instruction) -> Effect:
    """One lane of those that take part: the first."""
    target = predicate(i.operands[0])

    def elect(warp: Any, mask: Flags) -> None:
        first = np.arange(LANES) == int(np.argmax(mask))
        warp.state.write_flag(target, first, True, mask)

    return elect


def _granted(i: Instruction) -> Effect:
    target = predicate(i.operands[0])
    return lambda warp, mask: warp.state.write_flag(target, True, True, mask)


def _mbarrier(i: Instruction) -> Effect:
    """A wait is over at once; whoever waits for copies says how many bytes they are, which go
    through shared memory."""
    if "TRYWAIT" in i.modifiers:
        return _granted(i)
    mark = _unknown(i, 1)
    if not {"ARRIVE", "A0TR", "ART0"} & set(i.modifiers) or not i.operands[-1].startswith("R"):
        return mark
    read = word(i.operands[-1])

    def arrive(warp: Any, mask: Flags) -> None:
        value, known = read(warp.state)
        if known[mask].all():
            warp.shared += float(value[mask].sum()) / LINE
        mark(warp, mask)

    return arrive


def _unknown(i: Instruction, words: int) -> Effect:
    """Marks the results as not known: predicates, and ``words`` registers from the first on."""
    flags: list[int] = []
    registers: list[int] = []
    for text in i.operands[:2]:
        if is_predicate(text):
            flags.append(predicate(text))
        elif re.match(r"U?R", text):
            if register(text) % UNIFORM != 255:
                registers = [register(text) + n for n in range(words)]
            break

    def mark(warp: Any, mask: Flags) -> None:
        for n in registers:
            np.copyto(warp.state.known[n], False, where=mask)
        for n in flags:
            warp.state.write_flag(n, False, False, mask)

    return mark


def _integers(run: Run) -> Effect:
    return lambda warp, mask: run(warp.state, mask)


def _global(read: Read, size: int, then: Effect) -> Effect:
    def access(warp: Any, mask: Flags) -> None:
        address, known = read(warp.state)
        if known[mask].all():
            last = address[mask] + np.uint64(size - 1)
            sectors = np.concatenate([address[mask], last]) // np.uint64(SECTOR)
            warp.cached += len(set(sectors.tolist())) * SECTOR / LINE
        else:
            warp.cached += int(mask.sum()) * size / LINE
        then(warp, mask)

    return access


def _shared(i: Instruction, read: Read, size: int, then: Effect) -> Effect:
    """An access to shared memory, which gives and takes what is known of whole words."""
    stores, loads = i.name == "STS", i.name == "LDS"
    number = register(i.operands[1 if stores else 0]) if stores or loads else 255
    words = [number + n * (number % UNIFORM != 255) for n in range(max(size // BANK, 1))]

    def access(warp: Any, mask: Flags) -> None:
        address, known = read(warp.state)
        if not known[mask].all():
            warp.shared += int(mask.sum()) * size / LINE
            then(warp, mask)
            return
        warp.shared += warp.memory.steps(address, mask, size)
        state, memory = warp.state, warp.memory
        places = np.where(mask, address // np.uint64(BANK), np.uint64(0)).astype(int)
        for n, source in enumerate(words):
            if stores:
                memory.words[places[mask] + n] = state.words[source][mask]
                sure = state.known[source][mask] | (source % UNIFORM == 255)
                memory.known[places[mask] + n] = sure & (size >= BANK)
            elif loads and size >= BANK:
                state.write(source, memory.words[places + n], memory.known[places + n], mask)
        if not loads or size < BANK:
            then(warp, mask)

    return access


def effect(i: Instruction) -> Effect:
    """What an instruction does to a warp: its registers, its memory and its counts.

    Raises:
        ValueError: by the effect, if the instruction is not known.
    """
    if run := integer_operation(i):
        return _integers(run)
    if i.name == "ELECT":
        return _elect(i)
    if i.name == "SYNCS":
        return _mbarrier(i)
    if i.name == "USETMAXREG" and is_predicate(i.operands[0]):  # registers that others gave back
        return _granted(i)
    if i.name in SILENT:
        return lambda warp, mask: None
    if i.name not in UNKNOWN:

        def refuse(warp: Any, mask: Flags) -> None:
            raise ValueError(f"{i.name} at {i.at:#x} is not known")

        return refuse
    if i.name == "FCHK":  # of a division: no rare operands
        target = predicate(i.operands[0])
        return lambda warp, mask: warp.state.write_flag(target, False, True, mask)
    size = next((BYTES[m] for m in i.modifiers if m in BYTES), 4)
    words = 4 if i.name in ("HMMA", "LDSM") else max(size // BANK, 1)
    if i.name == "HGMMA":
        words = int(i.modifiers[0].split("x")[1]) // 2
    mark = _unknown(i, words)
    if i.name.startswith(("ST", "RED", "LDGSTS")):
        mark = lambda warp, mask: None  # noqa: E731
    if flops := tensor_flops(i):
        from_shared = operand_steps(i)

        def product(warp: Any, mask: Flags) -> None:
            warp.flops += flops
            warp.shared += from_shared
            mark(warp, mask)

        return product
    places = [address_of(text) for text in i.operands if "[" in text and text[0] != "c"]
    if i.name == "LDGSTS":
        return _shared(i, places[0], size, _global(places[1], size, mark))
    if i.name in ("LDSM", "STSM"):
        found = re.search(r"88(?:\.([24]))?", ".".join(i.modifiers))
        steps = int(found[1] or 1) if found else 1

        def matrices(warp: Any, mask: Flags) -> None:
            warp.shared += steps
            mark(warp, mask)

        return matrices
    if i.name in ("LDS", "STS", "ATOMS"):
        return _shared(i, places[0], size, mark)
    if places:
        return _global(places[0], size, mark)
    return mark
