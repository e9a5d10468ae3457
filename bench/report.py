"""The README's numbers, generated from the committed results.

``python -m bench.report`` rewrites what stands between ``<!-- bench:NAME -->`` and
``<!-- /bench -->``; ``--check`` only says whether that would change anything.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from . import report_tables, report_training
from .common import machine, results
from .common.results import Row
from .report_tables import Machine

TABLES = report_tables.TABLES | report_training.TABLES
OTHERS = ("compiled", "gpu")
"""Folders of results that no block of the README is made of."""
BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def load(folder: Path) -> list[Machine]:
    """Every machine's results, in the order of their names."""
    found = []
    for path in sorted(p for p in folder.glob("*") if p.is_dir() and p.name not in OTHERS):
        files: dict[str, Row] = {f.stem: results.read(f) for f in sorted(path.glob("*.json"))}
        if files:
            found.append(Machine(path, files))
    return found


def render(text: str, machines: list[Machine], root: Path) -> str:
    """``text`` with every block made anew; ``ValueError`` for an unknown or broken block."""
    blocks = BLOCK.findall(text)
    if text.count("<!-- bench:") != len(blocks):
        raise ValueError("a <!-- bench:NAME --> has no <!-- /bench --> after it")
    unknown = [name for _, name, _ in blocks if name not in TABLES]
    if unknown:
        raise ValueError(f"block must be one of {tuple(TABLES)}, got {unknown[0]!r}")

    def block(match: re.Match[str]) -> str:
        parts = [TABLES[match[2]](found, root) for found in machines]
        body = "\n\n".join(filter(None, parts)) or "*Not measured yet.*"
        return f"{match[1]}{body}\n{match[3]}"

    return BLOCK.sub(block, text)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite, or check; 1 if a file is stale."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if stale")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    parser.add_argument("--readme", type=Path, default=machine.ROOT / "README.md")
    args = parser.parse_args(arguments)
    before = args.readme.read_text()
    try:
        after = render(before, load(args.results), args.readme.resolve().parent)
    except ValueError as error:
        parser.error(f"{args.readme.name}: {error}")
    if before == after:
        print(f"{args.readme.name} is up to date")
        return 0
    if args.check:
        print(f"{args.readme.name} is stale: run python -m bench.report", file=sys.stderr)
        return 1
    args.readme.write_text(after)
    print(f"{args.readme.name} rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
