"""The picture of ``bench.quality_vs_k --task embeddings``."""

from itertools import cycle
from pathlib import Path
from typing import Any

from ..harness import results
from ..harness.results import Row
from ..harness.style import AMBER, BLUE, BROWN, GREY, NAVY, commit, sheet
from .embeddings import METRICS

COLOURS = {
    "untrained": "#a0aec0", "calibrated": AMBER, "calibrated on more text": BROWN, "trained": BLUE
}  # fmt: skip
SHOWN = ("cosine", "spearman", "neighbours")


def embeddings(content: Row, target: Path) -> None:
    """A row a metric, a panel a kind of text: over measured speed, from slow to fast."""
    rows = [row for row in content["summary"] if row["speedup"]]
    kinds = list(content["texts"])
    title = f"{content['model']['name']}: compressed embeddings against the original's"
    caption = (
        f"{content['machine']['cpu']}, {content['settings']['threads']} threads; dashed: no token "
        f"is kept whole. Commit {commit(content)}."
    )
    with sheet(target, len(SHOWN), len(kinds), (9, 9.5), title, caption) as grid:
        for line, metric in zip(grid, SHOWN, strict=True):
            for axes, kind in zip(line, kinds, strict=True):
                _panel(axes, results.pick(rows, text=kind), metric)
                axes.set_title(f"{content['texts'][kind]} texts: {kind}")
        grid[0][0].legend(fontsize=7, loc="lower left", handlelength=4)


def _panel(axes: Any, rows: list[Row], metric: str) -> None:
    spare = cycle((NAVY, "#2f855a", "#805ad5"))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        colour = COLOURS.get(variant) or next(spare)
        for kept in dict.fromkeys(row["kept"] for row in results.pick(rows, variant=variant)):
            found = results.pick(rows, variant=variant, kept=kept)
            places = sorted((row["speedup"]["median"], row[metric], row["k"]) for row in found)
            style = "o--" if kept == "none" else "o-"
            label = variant if kept == "none" else f"{variant}, {kept} kept"
            x, y, ratios = zip(*places, strict=True)
            axes.plot(x, y, style, color=colour, label=label)
            for place in zip(x, y, ratios, strict=True):
                axes.annotate(f"{place[2]}", place[:2], (3, 3), textcoords="offset points",
                              fontsize=7, color=GREY)  # fmt: skip
    axes.set_xlabel("speed-up of encode, measured")
    axes.set_ylabel(METRICS[metric])
    axes.grid()
