"""The figure of a GPU report: the curve over k, and every target beside its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .verdicts import verdicts


def draw(report: dict[str, Any], path: Path) -> Path:
    """Writes the PNG; panels without a measurement say so."""
    figure, (curve, targets) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    _curve(curve, [r for r in report["rows"] if r["name"] == "curve" and r["status"] == "ok"])
    found = [row for row in verdicts(report["rows"]) if row["value"] is not None]
    names = [f"{row['where']}\n{row['what']}" for row in found]
    parts = [row["value"] / row["limit"] for row in found]
    colours = ["#2b6cb0" if row["met"] else "#c05621" for row in found]
    targets.barh(range(len(found)), parts, color=colours)
    targets.set_yticks(range(len(found)), names, fontsize=6)
    targets.axvline(1, color="k", lw=0.8)
    targets.set_title("Measured over limit (for floor and memory, less is better)")
    title = "dry run without a GPU: no figure here is a GPU's" if report["dry_run"] else ""
    figure.suptitle(title or f"{report['machine']['gpu']}, {report['versions']['torch']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _curve(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Time against k, and the floor."""
    axes.set_title("FFN sublayer against the compression ratio")
    if not rows:
        axes.text(0.5, 0.5, "not measured", ha="center")
        return
    for arm, colour in (("hf", "#7b8794"), ("reference", "#e8a33d"), ("ours", "#2b6cb0")):
        some = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["k"])
        microseconds = [r["seconds"]["median"] * 1e6 for r in some]
        axes.plot([r["k"] for r in some], microseconds, "o-", color=colour, label=arm)
    floors = sorted((r["k"], r["floor"] * 1e6) for r in rows if "floor" in r)
    axes.plot(*zip(*floors, strict=True) if floors else ([], []), "--", color="k", label="floor")
    axes.set(xscale="log", yscale="log", xlabel="k", ylabel="microseconds, CUDA-graph replay")
    ratios = sorted({r["k"] for r in rows})
    axes.set_xticks(ratios, [str(k) for k in ratios], minor=False)
    axes.legend()
