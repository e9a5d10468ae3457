"""Which ratios pay at the length that was measured."""

from ..harness.results import Row


def rivals(costs: list[Row]) -> dict[int, int | None]:
    """For every ratio with a time, a smaller one that it does not clearly beat, or None: it pays.

    Clearly: the lower quartile of its speed-up lies above the other's upper one. Of the smaller
    ratios those count that pay themselves, the nearest first. In short rows a larger ratio leaves
    hardly fewer vectors.
    """
    found: dict[int, int | None] = {}
    paying: list[Row] = []
    for row in sorted((row for row in costs if row["status"] == "ok"), key=lambda row: row["k"]):
        near = [r["k"] for r in paying if r["speedup"]["q3"] >= row["speedup"]["q1"]]
        found[row["k"]] = max(near, default=None)
        if not near:
            paying.append(row)
    return found
