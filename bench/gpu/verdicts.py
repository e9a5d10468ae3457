"""Every target beside what was measured, and the table on the screen."""

from __future__ import annotations

from typing import Any

from .cases import TARGETS

Row = dict[str, Any]


def measured(row: Row, arm: str) -> float | None:
    """The ratio that a target speaks of, in one row of its own arm."""
    if arm == "floor":
        return row.get("over_floor")
    if arm == "memory":
        return row.get("memory_of_reference")
    found = row.get("speedup", {}).get(arm)
    return found["median"] if found else None


def verdicts(rows: list[Row]) -> list[Row]:
    """A row a target and case; ``value`` is None where nothing was measured."""
    made = []
    for target in TARGETS:
        of = [r for r in rows if r["name"] == target.case and r["arm"] == target.of]
        for row in of:
            value = measured(row, target.arm)
            met = None
            if value is not None:
                met = value >= target.limit if target.at_least else value <= target.limit
            where = f"{row['model']}, {row['batch']} x {row['length']}, k={row['k']}"
            made.append({**target._asdict(), "where": where, "value": value, "met": met})
    return made


def text(report: Row) -> str:
    """The report in lines."""
    lines = []
    for row in report["rows"]:
        what = f"{row['name']:<9}{row['model']:<10}{row['batch']:>3} x {row['length']:<5}"
        what += f"k={row['k']:<3}{row['arm']:<19}"
        if row["status"] != "ok":
            lines.append(f"{what}{row['status'].upper()}: {row['reason']}")
            continue
        graph, wall = row["seconds"]["median"] * 1e6, row["wall"]["median"] * 1e6
        extra = f"  {row['over_floor']:.2f} x floor" if "over_floor" in row else ""
        how = "graph " if row["captured"] else "queued"  # not captured: launches of the host
        lines.append(f"{what}{graph:10.1f} us {how} {wall:10.1f} us eager{extra}")
    lines.append("")
    for row in verdicts(report["rows"]):
        value = "not measured" if row["value"] is None else f"{row['value']:.2f}"
        sign = ">=" if row["at_least"] else "<="
        met = {None: "", True: "met", False: "MISSED"}[row["met"]]
        lines.append(f"{row['where']:<32}{row['what']:<55}{value:>13} {sign} {row['limit']} {met}")
    return "\n".join(lines)
