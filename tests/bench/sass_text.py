"""Machine code for tests, written as lines of text."""

from bench.tools import sass
from bench.tools.sass_walk import Count, Launch, walk


def code(text: str) -> list[sass.Instruction]:
    lines = [line.strip() for line in text.strip().splitlines()]
    return sass.instructions(
        "\n".join(f"/*{16 * n:04x}*/ {line} ;" for n, line in enumerate(lines))
    )


def count(text: str, *parameters: int, threads: int = 32) -> Count:
    """What a block does whose parameters are words."""
    bank = bytes(0x210) + b"".join(p.to_bytes(4, "little") for p in parameters)
    return walk(Launch(code(text), threads, bank))[0]
