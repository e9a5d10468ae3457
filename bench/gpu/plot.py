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
    rows = [r for r in report["rows"] if r["name"] == "curve" and r["status"] == "ok"]
    for arm, colour in (("hf", "#7b8794"), ("reference", "#e8a33d"), ("ours", "#2b6cb0")):
        some = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["k"])
        microseconds = [r["seconds"]["median"] * 1e6 for r in some]
        curve.plot([r["k"] for r in some], microseconds, "o-", color=colour, label=arm)
    floors = sorted((r["k"], r["floor"] * 1e6) for r in rows if "floor" in r)
    curve.plot(*zip(*floors, strict=True) if floors else ([], []), "--", color="k", label="floor")
    curve.set(xscale="log", yscale="log", xlabel="k", ylabel="microseconds, CUDA-graph replay")
    curve.set_xticks([k for k, _ in floors], [str(k) for k, _ in floors], minor=False)
    curve.set_title("FFN sublayer against the compression ratio")
    curve.legend()
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
