"""The numbers in README.md and docs/, generated from the committed results.

``python -m bench.tools.report`` rewrites what stands between ``<!-- bench:NAME -->`` and
``<!-- /bench -->``; ``--check`` only says whether that would change anything.
"""

import argparse
import re
import sys
from pathlib import Path

from bench.harness import machine, results
from bench.harness.results import Row
from bench.tools import (
    report_levels,
    report_parts,
    report_projected,
    report_speed,
    report_training,
)
from bench.tools.report_speed import Machine

TABLES = report_speed.TABLES | report_parts.TABLES | report_training.TABLES | report_levels.TABLES
TABLES |= report_projected.TABLES
OTHERS = ("compiled", "gpu")
"""Folders of results that no block is made of."""
BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def load(folder: Path) -> list[Machine]:
    """Every machine's results, in the order of their names."""
    found = []
    for path in sorted(p for p in folder.glob("*") if p.is_dir() and p.name not in OTHERS):
        files: dict[str, Row] = {f.stem: results.read(f) for f in sorted(path.glob("*.json"))}
        if files:
            found.append(Machine(path, files))
    return found


def render(text: str, machines: list[Machine], folder: Path) -> str:
    """``text``, of a file in ``folder``, with every block made anew.

    Raises:
        ValueError: an unknown or broken block.
    """
    blocks = BLOCK.findall(text)
    if text.count("<!-- bench:") != len(blocks):
        raise ValueError("a <!-- bench:NAME --> has no <!-- /bench --> after it")
    unknown = [name for _, name, _ in blocks if name not in TABLES]
    if unknown:
        raise ValueError(f"block must be one of {tuple(TABLES)}, got {unknown[0]!r}")

    def block(match: re.Match[str]) -> str:
        parts = [TABLES[match[2]](found, folder) for found in machines]
        body = "\n\n".join(filter(None, parts)) or "*Not measured yet.*"
        return f"{match[1]}{body}\n{match[3]}"

    return BLOCK.sub(block, text)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite, or check; 1 if a file is stale."""
    parser = argparse.ArgumentParser(prog="python -m bench.tools.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if stale")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    parser.add_argument("files", nargs="*", type=Path, help="default: README.md and docs/*.md")
    args = parser.parse_args(arguments)
    docs = sorted((machine.ROOT / "docs").glob("*.md"))
    machines, stale = load(args.results), []
    for path in args.files or [machine.ROOT / "README.md", *docs]:
        before = path.read_text()
        try:
            after = render(before, machines, path.resolve().parent)
        except ValueError as error:
            parser.error(f"{path.name}: {error}")
        if before != after:
            stale.append(path.name)
            if not args.check:
                path.write_text(after)
    if not stale:
        print("up to date")
    elif args.check:
        print(f"stale: {', '.join(stale)}; run python -m bench.tools.report", file=sys.stderr)
    else:
        print(f"rewritten: {', '.join(stale)}")
    return int(bool(stale) and args.check)


if __name__ == "__main__":
    sys.exit(main())
