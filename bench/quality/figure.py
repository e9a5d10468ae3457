"""Accuracy against measured speed."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from ..common import results
from ..common.results import Row
from ..plot import BOUND, INK, RC

COLOURS = {
    "full": "#2b6cb0",
    "calibrated only": "#e8a33d",
    "untrained": "#a0aec0",
}
SINGLE = {
    "k=4 alone": "o",
    "without pre-training": "<",
    "from initial values": "v",
    "without adaptation": "^",
    "mean pooling": "s",
    "copy": "D",
    "last layer alone": "X",
    "r=40": "P",
}


def draw(content: Row, path: Path) -> Path:
    """Lines over k; ablations are single points."""
    target = path.with_suffix(".png")
    rows = [row for row in content["summary"] if row["speedup"]]
    dense = 100 * rows[0]["dense_accuracy"]
    with plt.rc_context(RC):
        figure, axes = plt.subplots(figsize=(6.2, 4.4), layout="constrained")
        axes.axhline(dense, color=BOUND, lw=1.2, ls="--")
        axes.annotate(
            "the original",
            (0.99, dense),
            xycoords=("axes fraction", "data"),
            color=BOUND,
            fontsize=8,
            ha="right",
            va="bottom",
        )
        for variant, colour in COLOURS.items():
            line = sorted(results.pick(rows, variant=variant), key=lambda row: row["k"])
            points = [(row["speedup"], 100 * row["accuracy"]) for row in line]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=variant)
            for row, point in zip(line, points, strict=True):
                if variant == "full":
                    axes.annotate(
                        f"k={row['k']}", point, (0, -16), textcoords="offset points", ha="center"
                    )
        for variant, marker in SINGLE.items():
            for row in results.pick(rows, variant=variant):
                label = variant if "k=" in variant else f"{variant}, k={row['k']}"
                place = row["speedup"], 100 * row["accuracy"]
                axes.plot(*place, marker, color=INK, ms=5, ls="none", label=label)
        axes.set_xlabel("speed-up of the encoder on the dev set, measured")
        axes.set_ylabel("accuracy, %")
        axes.set_title(f"{content['task']}, {content['model']['name']}")
        axes.legend(fontsize=7)
        figure.savefig(target, dpi=160)
        plt.close(figure)
    return target
