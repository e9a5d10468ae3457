"""The figure of a neurons result: active neurons and overlaps over k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .common import results
from .common.results import Row
from .plot import BOUND, GRID, RC

ACTIVE = {
    "union": {"color": "#7b8794", "marker": "v", "label": "any token of the group (union)"},
    "merged": {"color": "#2b6cb0", "marker": "o", "label": "the merged vector"},
    "token": {"color": "#e8a33d", "marker": "s", "label": "one token"},
    "intersection": {"color": "#c05621", "marker": "^", "label": "every token (intersection)"},
}
OVERLAP = {
    "union_kept": {
        "color": "#7b8794",
        "marker": "v",
        "label": "of the union, active in the merged vector",
    },
    "merged_in_intersection": {
        "color": "#c05621",
        "marker": "^",
        "label": "of the merged vector's, active in every token",
    },
}
LINES = {"untrained": "-", "trained": "--"}


def draw(content: Row, path: Path) -> Path:
    """Draw a result beside its JSON: a row of panels a model."""
    rows = results.pick(content["rows"], status="ok", layer="all")
    names = list(dict.fromkeys(row["model"] for row in rows))
    target = path.with_suffix(".png")
    with plt.rc_context(RC):
        height = max(len(names), 1)
        figure, grid = plt.subplots(
            height, 2, figsize=(10.8, 4.2 * height + 0.7), layout="constrained", squeeze=False
        )
        for line, name in zip(grid, names, strict=False):
            mine = results.pick(rows, model=name)
            title = f"{name}, weights {mine[0]['weights']}"
            panel(line[0], mine, ACTIVE, f"{title}: active neurons", "% of the FFN's neurons")
            panel(line[1], mine, OVERLAP, f"{title}: overlap", "%")
        figure.suptitle("FFN neurons that merged vectors switch on", fontweight="bold")
        figure.supxlabel(_caption(content), fontsize=7.5, color=BOUND)
        figure.savefig(target, dpi=160)
        plt.close(figure)
    return target


def panel(axes: Axes, rows: list[Row], styles: dict[str, Any], title: str, label: str) -> None:
    """Shares over k; a line style for untrained and one for trained plugins."""
    kinds = {kind: results.pick(rows, plugins=kind) for kind in LINES}
    for kind, cells in kinds.items():
        for share, style in styles.items() if cells else ():
            k, values = [row["k"] for row in cells], [100 * row[share] for row in cells]
            named = style if kind == next(iter(LINES)) else style | {"label": None}
            axes.plot(k, values, LINES[kind], lw=1.8, ms=4.5, **named)
    if all(kinds.values()):
        for kind, line in LINES.items():
            axes.plot([], [], line, color=BOUND, label=f"{kind} plugins")
    ticks = sorted({row["k"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, None)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left")
    axes.set_xlabel("compression ratio k")
    axes.set_ylabel(label)
    columns = 2 if len(styles) > 2 else 1  # these have long names
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)


def _caption(content: Row) -> str:
    settings, git = content["settings"], content["git"]
    commit = (git["commit"] or "none")[:9] + ("+" if git["dirty"] else "")
    return (
        f"{settings['rows']} paragraphs of {settings['data']}, at most {settings['length']} tokens "
        f"each; a neuron is active if the input of its activation function is above "
        f"{settings['threshold']:g}.\nTokens and merged vectors as the compressed model meets "
        f"them; whole groups only; all layers together. Commit {commit}."
    )
