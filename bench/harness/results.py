"""Result files: what a benchmark writes and the plots, targets and reports read."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import machine

SCHEMA = 1
Row = dict[str, Any]
ABSENT: Row = {"placements": ["ffn"]}
"""What rows of older files do not say."""


def result(benchmark: str, settings: Row, model: Row) -> Row:
    """An empty result that says where and of what it is."""
    return {
        "benchmark": benchmark,
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "git": machine.commit(),
        "settings": settings,
        "model": model,
        "rows": [],
    }


def folder(output: str | None, publish: bool = False) -> Path:
    """Where results go: the folder asked for, else one that git ignores, or, to ``publish``, the
    committed one of this kind of machine."""
    here = machine.RESULTS if publish else machine.RESULTS / "local"
    path = Path(output) if output else here / machine.slug()
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, content: Row | list[Row]) -> None:
    """Write at once or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def read(path: str | Path) -> Row:
    """A result file; ``ValueError`` if it is none."""
    content = json.loads(Path(path).read_text())
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a result of these benchmarks (schema {SCHEMA})")
    if "name" in content.get("model", {}):
        for row in content["rows"]:  # older ones do not say it
            row.setdefault("model", content["model"]["name"])
    return content


def pick(rows: list[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values."""
    items = wanted.items()
    return [r for r in rows if all(r.get(key, ABSENT.get(key)) == value for key, value in items)]


def placements(row: Row) -> str:
    """Where a row's plugins are, in words; empty for a dense arm."""
    return " + ".join((ABSENT | row)["placements"])


def one(rows: list[Row], **wanted: Any) -> Row | None:
    """The first measured row that has these values."""
    return next((row for row in pick(rows, **wanted) if row["status"] == "ok"), None)


def speedup(row: Row | None, baseline: str, quantile: str = "median") -> float | None:
    """How much faster a row is than a baseline of its own run."""
    found = (row or {}).get("speedup", {}).get(baseline)
    return found[quantile] if found else None


def best(rows: list[Row], key: Callable[[Row], float | None]) -> float | None:
    """The largest value among rows that have one."""
    values = [value for row in rows if (value := key(row)) is not None]
    return max(values, default=None)
