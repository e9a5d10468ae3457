"""The one table writer: columns once, for the screen and for Markdown; and the progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from .results import Row, placements
from .runner import DENSE, Progress

ABOVE = "A cell can lie above it, because no dense arm runs at the machine's peak."
MIB = 2**20


class Column(NamedTuple):
    """A heading, and a row's text under it."""

    heading: str
    cell: Callable[[Row], str]
    always: bool = False
    """Names the row: filled in rows without numbers too."""


def screen(
    title: str,
    columns: list[Column],
    rows: list[Row],
    section: str = "",
    note: Callable[[Row], str] = lambda row: "",
) -> Table:
    """A rich table. A row that is not ok says so and why, and holds no number.

    ``section``: a line before each row whose value of this key is another than the row's before.
    """
    made = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate([*columns, Column("note", note)]):
        named = not place or place == len(columns)
        how: Any = {"justify": "left" if named else "right", "no_wrap": not place}
        made.add_column(column.heading, **how)
    for before, row in zip([None, *rows], rows, strict=False):
        if section and before is not None and before[section] != row[section]:
            made.add_section()
        status = row.get("status", "ok")
        cells = [c.cell(row) if status == "ok" or c.always else "" for c in columns]
        if status == "ok":
            made.add_row(*cells, note(row))
            continue
        colour = "red" if status == "failed" else "yellow"
        reason = row["reason"].replace("[", r"\[")
        made.add_row(*cells, f"[{colour}]{status.upper()}[/{colour}] {reason}")
    return made


def markdown(columns: list[Column], rows: list[Row]) -> str:
    """A Markdown table; empty without rows."""
    if not rows:
        return ""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    lines = [[column.cell(row) for column in columns] for row in rows]
    every = ([column.heading for column in columns], rule, *lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def key(heading: str, name: str, always: bool = True) -> Column:
    """A column of a value as it is; empty for None."""
    return Column(heading, lambda row: "" if row[name] is None else str(row[name]), always)


def number(heading: str, read: Callable[[Row], float | None], form: str = ".2f") -> Column:
    """A column of numbers; empty for None."""

    def cell(row: Row) -> str:
        value = read(row)
        return "" if value is None else format(value, form)

    return Column(heading, cell)


def mib(heading: str, name: str, form: str = ".1f") -> Column:
    """A column of bytes as MiB."""
    return number(heading, lambda row: None if row[name] is None else row[name] / MIB, form)


CHECK = Column("error / allowed", lambda row: f"{row['error']:.1e} / {row['allowed']:.1e}")


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A bar a case."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("{task.fields[what]}"))  # fmt: skip
    with Bar(*columns, console=console) as bar:
        task: Any = None

        def start(title: str, steps: int) -> None:
            nonlocal task
            task = bar.add_task(title, total=steps, what="")

        def step(what: str = "") -> None:
            bar.update(task, advance=1, what=what)

        yield Progress(start, step)


def milliseconds(row: Row) -> str:
    """Median and quartiles."""
    median, q1, q3 = (row[name] * 1e3 for name in ("median", "q1", "q3"))
    digits = 3 if median < 1 else 2 if median < 10 else 1
    return f"{median:.{digits}f} ({q1:.{digits}f} to {q3:.{digits}f})"


def times(found: dict[str, float] | None, digits: int = 2) -> str:
    """A speed-up and its quartiles."""
    if not found:
        return ""
    median, q1, q3 = (f"{found[name]:.{digits}f}" for name in ("median", "q1", "q3"))
    return f"{median} ({q1} to {q3})"


def over_ffn(row: Row) -> dict[str, float] | None:
    """The speed-up over the same arm with plugins at FFNs alone, where the run has that too."""
    return row.get("speedup", {}).get(f"{row['arm']}, ffn")


def timed(title: str, rows: list[Row]) -> Table:
    """The rows of a case as the runner gives them."""
    names = {name for row in rows for name in row.get("speedup", {})}
    over = next((name for name in (*DENSE, "reference", "linear") if name in names), None)
    several = any(placements(row) not in ("", "ffn") for row in rows)

    def arm(row: Row) -> str:
        parts = [row["arm"]] + ([row["padding"]] if row["padding"] != "none" else [])
        return ", ".join(parts + ([placements(row)] if several and row["k"] else []))

    def note(row: Row) -> str:
        parts = ["above the bound" if row["above_bound"] else "", row["detail"]]
        return "; ".join(filter(None, [*parts, row["reason"]]))

    columns = [Column("arm", arm, True), key("k", "k"), Column("ms", milliseconds)]
    if any("eager" in row for row in rows):
        columns.append(number("eager, ms", lambda row: row["eager"]["median"] * 1e3, ".3f"))
    if over:
        columns.append(Column(f"speed-up over {over}", lambda row: times(row["speedup"].get(over))))
    if any(over_ffn(row) for row in rows):
        columns.append(Column("over ffn alone", lambda row: times(over_ffn(row))))
    if any(row["bound"] for row in rows):
        columns.append(number("cost bound", lambda row: row["bound"])._replace(always=True))
    if any("floor" in row for row in rows):
        columns.append(number("over floor", lambda row: row.get("over_floor")))
    columns += [number("ns a token", lambda row: row["ns_per_token"], ".0f"), CHECK]
    return screen(title, columns, rows, "k", note)
