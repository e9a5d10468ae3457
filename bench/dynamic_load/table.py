"""The results as tables, and what the issue asks of them."""

from typing import Any

from ..harness import tables
from ..harness.results import Row

MISS, SOON, BURST_POINTS, POINTS = 3.0, 5.0, 1.0, 0.5
"""Fixed dense misses the target by so much; dense again within seconds; points lost at most."""


def _ms(heading: str, read: Any) -> tables.Column:
    return tables.number(heading, lambda row: 1e3 * read(row), ".0f")


def _burst(row: Row) -> Row:
    return row["phases"][1]


def _shares(levels: dict[str, float]) -> str:
    return " ".join(f"{name}:{100 * share:.0f}" for name, share in levels.items() if share)


def _holds(row: Row) -> str:
    return row["bound"] or f"{row['largest']:.1f}"


def lost(row: Row) -> float:
    """Points of accuracy, against the dense model on the same requests."""
    return row["dense_accuracy"] - row["accuracy"]


TRACE = [
    tables.key("arm", "arm"),
    _ms("half: p50, ms", lambda row: row["phases"][0]["p50"]),
    _ms("p99", lambda row: row["phases"][0]["p99"]),
    _ms("burst: p50, ms", lambda row: _burst(row)["p50"]),
    _ms("p95", lambda row: _burst(row)["p95"]),
    _ms("p99", lambda row: _burst(row)["p99"]),
    _ms("target", lambda row: row["target"]),
    tables.Column("burst at k, %", lambda row: _shares(_burst(row)["levels"])),
    tables.number("points lost in it", lambda row: lost(_burst(row))),
    tables.number("over all", lost),
    tables.number("compressed after it, s", lambda row: row["compressed_for"], ".1f"),
    _ms("sent late, p99, ms", lambda row: row["late_p99"]),
]
SIMULATION = [
    tables.key("load, dense machines at 100 %", "load"),
    tables.key("arm", "arm"),
    tables.key("machines needed", "machines", always=False),
    _ms("p99, ms", lambda row: row["p99"]),
    tables.Column("at k, %", lambda row: _shares(row["levels"])),
]
BURSTS = [
    tables.key("arm", "arm"),
    tables.Column("largest burst that holds, x dense capacity", lambda row: _holds(row)),
]
SOAK = [
    tables.key("arm", "arm"),
    tables.number("seconds", lambda row: row["seconds"], ".0f"),
    tables.number("requests", lambda row: row["requests"], ".0f"),
    _ms("p99, ms", lambda row: row["p99"]),
    tables.number("memory grew by, %", lambda row: 100 * row["growth"]),
    tables.Column("at k, %", lambda row: _shares(row["levels"])),
]


def note(row: Row) -> str:
    """Whether an arm does what is asked of it."""
    burst = _burst(row)["p99"]
    if row["arm"] == "dense":
        met = burst >= MISS * row["target"]
        return f"misses the target {burst / row['target']:.1f}x{'' if met else ', less than 3x'}"
    if row["arm"] != "controlled":
        return ""
    asked = {
        "late in the burst": burst <= row["target"],
        "late to be dense again": row["compressed_for"] <= SOON,
        "points in the burst": lost(_burst(row)) <= BURST_POINTS,
        "points over all": lost(row) <= POINTS,
    }
    missed = [name for name, met in asked.items() if not met]
    return f"missed: {', '.join(missed)}" if missed else "all met"


def line(row: Row) -> str:
    """While a run goes on."""
    if row["status"] != "ok":
        return f"{row['case']} {row['arm']}: {row['reason']}"
    parts = [f"{row['case']} {row['arm']}"]
    if "phases" in row:
        parts += [f"{p['phase']}: p99 {1e3 * p['p99']:.0f} ms" for p in row["phases"]]
    if "largest" in row:
        parts.append(f"holds {_holds(row)} x")
    return ", ".join(parts)


def tables_of(content: Row) -> list[Any]:
    """One for each kind of row there is."""
    kinds = {
        "trace": ("A trace with a burst", TRACE, note),
        "simulation": ("Machines that a load needs, simulated", SIMULATION, lambda row: ""),
        "bursts": ("Bursts", BURSTS, lambda row: ""),
        "soak": ("Soak", SOAK, lambda row: ""),
    }
    made = []
    for case, (title, columns, notes) in kinds.items():
        rows = [row for row in content["rows"] if row["case"] == case]
        if rows:
            section = "load" if case == "simulation" else ""
            made.append(tables.screen(title, columns, rows, section, notes))
    return made
