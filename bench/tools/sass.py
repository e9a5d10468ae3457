"""Machine code as text: what ``cuobjdump`` prints, instruction by instruction."""

import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench.tools.cuda_resources import disassembler

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([^;]+);")


class Instruction(NamedTuple):
    """``@guard name.modifiers operands`` at an address."""

    at: int
    guard: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]


def instructions(code: str) -> list[Instruction]:
    """The instructions of one kernel's text."""
    found = []
    for at, guard, text in LINE.findall(code):
        name, _, rest = text.strip().partition(" ")
        name, *modifiers = name.split(".")
        operands = [part.replace(".reuse", "").strip() for part in rest.split(",")]
        operands = operands if rest.strip() else []
        found.append(
            Instruction(int(at, 16), guard, name, tuple(modifiers), tuple(operands))
        )  # fmt: skip
    return found


def disassembled(cubin: bytes) -> str:
    """The machine code of a file's kernels as text.

    Raises:
        FileNotFoundError: there is no ``cuobjdump``.
    """
    tool = disassembler()
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither on PATH nor in Triton's package")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [tool, "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels(text: str) -> dict[str, list[Instruction]]:
    """The kernels of :func:`disassembled`, by symbol."""
    pieces = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
    return {
        symbol: instructions(code)
        for symbol, code in zip(pieces[1::2], pieces[2::2], strict=True)
    }  # fmt: skip


def jump_tables(cubin: bytes) -> dict[str, bytes]:
    """Where indirect branches of a kernel go to, by symbol: its constant bank 2."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<2I4Q", cubin, start + n * size) for n in range(count)]
    found = {}
    for header in headers:
        at = headers[names][4] + header[0]
        name = cubin[at : cubin.index(b"\0", at)].decode()
        if name.startswith(".nv.constant2."):
            found[name.removeprefix(".nv.constant2.")] = cubin[header[4] :][: header[5]]
    return found
