"""What every figure shares: colours, the sheet of panels, the axis of ratios."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .results import Row, speedup

INK, GRID, GREY = "#1f2933", "#e4e7eb", "#7b8794"
AMBER, BROWN, BLUE, NAVY = "#e8a33d", "#c05621", "#2b6cb0", "#1a365d"
DENSE = "#9fb3c8"
ENCODER_NAMES = {
    "hf": "HF eager", "hf-sdpa": "HF SDPA", "hf-compiled": "HF compiled", "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime", "ctranslate2": "CTranslate2", "torchao-pt2e": "torchao PT2E",
    "ours": "variator", "ours-compiled": "variator\ncompiled",
}  # fmt: skip
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


def note(
    axes: Axes, text: str, place: tuple[Any, Any], off: tuple[int, int] = (4, 3), **style: Any
) -> None:
    """A word beside a point, so many points off."""
    how: Any = {"fontsize": 7, "color": GREY, "textcoords": "offset points"} | style
    axes.annotate(text, place, off, **how)


def bars(axes: Axes, cells: list[tuple[str, str, Row]], base: str) -> None:
    """Times of a name, a colour and a row each, with quartiles, and the speed-up over ``base``."""
    for place, (_, colour, row) in enumerate(cells):
        median = row["median"]
        axes.barh(place, median, color=colour, height=0.66)
        spread = [[median - row["q1"]], [row["q3"] - median]]
        axes.errorbar(median, place, xerr=spread, color=INK, lw=1, capsize=2)
        factor = speedup(row, base)
        text = f"{median:.3g} s" + (f"   {factor:.2f}x" if factor else "")
        note(axes, text, (row["q3"], place), (6, 0), va="center", fontsize=8.5, color=INK)
    axes.set_yticks(range(len(cells)), [name for name, _, _ in cells])
    axes.invert_yaxis()
    axes.set_xlim(0, max((row["q3"] for _, _, row in cells), default=1) * 1.4)
    axes.grid(axis="x")


def commit(content: Row) -> str:
    """Short, with a plus for local changes."""
    git = content["git"]
    return (git["commit"] or "none")[:9] + ("+" if git["dirty"] else "")
