"""Results on the screen: rich tables and the progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from .cells import DENSE, Progress
from .results import Row

ABOVE = "A cell can lie above it, because no dense arm runs at the machine's peak."


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A bar a case."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Bar(*columns, console=console) as bar:
        task: Any = None

        def start(title: str, steps: int) -> None:
            nonlocal task
            task = bar.add_task(title, total=steps, what="")

        def step(what: str) -> None:
            bar.update(task, advance=1, what=what)

        yield Progress(start, step)


def milliseconds(row: Row) -> str:
    """Median and quartiles."""
    median, q1, q3 = (row[name] * 1e3 for name in ("median", "q1", "q3"))
    digits = 3 if median < 1 else 2 if median < 10 else 1
    return f"{median:.{digits}f} ({q1:.{digits}f} to {q3:.{digits}f})"


def times(found: dict[str, float] | None) -> str:
    """A speed-up and its quartiles."""
    if not found:
        return ""
    return f"{found['median']:.2f} ({found['q1']:.2f} to {found['q3']:.2f})"


def baseline(rows: list[Row]) -> str | None:
    """What speed-ups of these rows are over: the strongest dense arm by rank, or the reference."""
    names = [name for row in rows for name in row.get("speedup", {})]
    return next((name for name in (*DENSE, "reference") if name in names), None)


def table(title: str, rows: list[Row]) -> Table:
    """One case. No row without a green check holds a number."""
    base = baseline(rows)
    made = Table(title=title, title_justify="left", title_style="bold")
    made.add_column("arm")
    numeric = ("k", "ms", f"speed-up over {base}", "cost bound", "ns a token", "error / allowed")
    for name in numeric:
        made.add_column(name, justify="right")
    made.add_column("note")
    last = None
    for row in rows:
        if last is not None and row["k"] != last["k"]:
            made.add_section()
        made.add_row(*_cells(row, base))
        last = row
    return made


def _cells(row: Row, base: str | None) -> list[str]:
    name = row["arm"] + (f", {row['padding']}" if row["padding"] != "none" else "")
    k = str(row["k"] or "")
    bound = f"{row['bound']:.2f}" if row["bound"] else ""
    if row["status"] != "ok":
        colour = "red" if row["status"] == "failed" else "yellow"
        status = f"[{colour}]{row['status'].upper()}[/{colour}]"
        return [name, k, status, "", bound, "", "", row["reason"].replace("[", r"\[")]
    note = row["detail"]
    if row["above_bound"]:
        note = "above the bound" + (f"; {note}" if note else "")
    speedup = times(row["speedup"].get(base))
    error = f"{row['error']:.1e} / {row['allowed']:.1e}"
    return [name, k, milliseconds(row), speedup, bound, f"{row['ns_per_token']:.0f}", error, note]
