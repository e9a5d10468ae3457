"""What every figure shares: colours, the sheet of panels, the axis of ratios."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .results import Row

INK, GRID, GREY = "#1f2933", "#e4e7eb", "#7b8794"
AMBER, BROWN, BLUE, NAVY = "#e8a33d", "#c05621", "#2b6cb0", "#1a365d"
RC: Any = {
    "font.size": 10, "axes.edgecolor": GREY, "axes.labelcolor": INK, "axes.titleweight": "bold",
    "axes.titlesize": 11, "axes.titlecolor": INK, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.8, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 4.5,
}  # fmt: skip


@contextmanager
def sheet(
    target: Path, height: int, width: int, size: tuple[float, float], title: str, caption: str
) -> Iterator[list[Any]]:
    """Rows of panels, saved at the end; panels of one row share nothing with those of another."""
    with plt.rc_context(RC):
        figure = plt.figure(figsize=size, layout="constrained")
        lines = figure.subfigures(max(height, 1), 1, squeeze=False)[:, 0]
        yield [line.subplots(1, max(width, 1), squeeze=False)[0] for line in lines]
        figure.suptitle(title, fontsize=12, fontweight="bold")
        figure.supxlabel(caption, fontsize=7.5, color=GREY)
        figure.savefig(target, dpi=160)
        plt.close(figure)


def over_k(axes: Axes, ticks: list[int]) -> None:
    """The compression ratio as x-axis."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_xlabel("compression ratio k")
    axes.grid()


def commit(content: Row) -> str:
    """Short, with a plus for local changes."""
    git = content["git"]
    return (git["commit"] or "none")[:9] + ("+" if git["dirty"] else "")
