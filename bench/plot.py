"""The figure of a speed-vs-k result: ``python -m bench.plot RESULT.json`` draws it again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .common import results
from .common.results import Row

INK, GRID, BOUND = "#1f2933", "#e4e7eb", "#7b8794"
STYLES: dict[str, dict[str, Any]] = {
    "reference": {"color": "#e8a33d", "marker": "s", "label": "plain PyTorch, eager"},
    "reference-compiled": {"color": "#c05621", "marker": "D", "label": "plain PyTorch, compiled"},
    "ours": {"color": "#2b6cb0", "marker": "o", "label": "variator_kernels"},
    "ours-compiled": {"color": "#1a365d", "marker": "^", "label": "variator_kernels, compiled"},
}
ENCODER_NAMES = {
    "hf": "HF eager",
    "hf-sdpa": "HF SDPA",
    "hf-compiled": "HF compiled",
    "openvino": "OpenVINO",
    "ours": "variator",
    "ours-compiled": "variator\ncompiled",
}
RC: Any = {
    "font.size": 10,
    "axes.edgecolor": BOUND,
    "axes.labelcolor": INK,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def draw(content: Row, path: Path) -> Path:
    """Draw a result beside its JSON; a row of panels a scope, a panel a dtype."""
    rows = content["rows"]
    scopes = [name for name in ("sublayer", "encoder") if results.pick(rows, case=name)]
    dtypes = [d for d in content["settings"]["dtype"] if results.pick(rows, dtype=d)]
    target = path.with_suffix(".png")
    with plt.rc_context(RC):
        width, height = max(len(dtypes), 1), max(len(scopes), 1)
        size = (max(5.4 * width, 7), 3.9 * height + 0.9)
        figure = plt.figure(figsize=size, layout="constrained")
        lines = figure.subfigures(height, 1, squeeze=False)[:, 0]
        for line, scope in zip(lines, scopes, strict=False):
            grid = line.subplots(1, width, squeeze=False)[0]
            for axes, dtype in zip(grid, dtypes, strict=False):
                panel = results.pick(rows, case=scope, dtype=dtype)
                (curves if scope == "sublayer" else bars)(axes, panel, dtype)
        figure.suptitle(_title(content), fontsize=12, fontweight="bold")
        figure.supxlabel(_caption(content), fontsize=7.5, color=BOUND)
        figure.savefig(target, dpi=160)
        plt.close(figure)
    return target


def curves(axes: Axes, rows: list[Row], dtype: str) -> None:
    """Speed-up of the sublayer over k, with quartiles and the cost bound."""
    base = _base(rows, ("dense-packed", "hf"))
    name = {"dense-packed": "dense, weights packed", "hf": "dense, Hugging Face"}.get(base or "")
    bounds = sorted({(row["k"], row["bound"]) for row in rows if row["k"]})
    if bounds:
        axes.plot(*zip(*bounds, strict=True), "--", color=BOUND, lw=1.3, label="cost bound")
    for arm, style in STYLES.items():
        cells = [row for row in rows if row["arm"] == arm and results.speedup(row, base or "")]
        if not cells:
            continue
        k = [row["k"] for row in cells]
        low, mid, high = (
            [row["speedup"][base][q] for row in cells] for q in ("q1", "median", "q3")
        )
        axes.fill_between(k, low, high, color=style["color"], alpha=0.16, lw=0)
        axes.plot(k, mid, lw=1.8, ms=4.5, **style)
    axes.axhline(1, color=BOUND, lw=0.8)
    axes.set_xscale("log", base=2)
    ticks = [k for k, _ in bounds]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_title(f"FFN sublayer, {dtype}", loc="left")
    axes.set_xlabel("compression ratio k")
    axes.set_ylabel(f"speed-up over {name}" if name else "no dense baseline")
    axes.legend(loc="upper left", fontsize=8.5)


def bars(axes: Axes, rows: list[Row], dtype: str) -> None:
    """Time of the whole encoder by arm, with quartiles, and the speed-up over SDPA."""
    cells = [row for row in rows if row["status"] == "ok"]
    base = _base(rows, ("hf-sdpa", "hf"))
    for place, row in enumerate(cells):
        ours = row["k"] is not None
        colour = STYLES[row["arm"]]["color"] if ours else "#9fb3c8"
        spread = [[row["median"] - row["q1"]], [row["q3"] - row["median"]]]
        axes.barh(place, row["median"], color=colour, height=0.66)
        axes.errorbar(row["median"], place, xerr=spread, color=INK, lw=1, capsize=2)
        factor = results.speedup(row, base or "")
        text = f"{row['median']:.3g} s" + (f"   {factor:.2f}x" if factor else "")
        axes.annotate(
            text, (row["q3"], place), (6, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    names = [
        str(ENCODER_NAMES.get(row["arm"], row["arm"])) + (f", k={row['k']}" if row["k"] else "")
        for row in cells
    ]
    axes.set_yticks(range(len(cells)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max((row["q3"] for row in cells), default=1) * 1.4)
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_title(f"Whole encoder, {dtype}", loc="left")
    axes.set_xlabel("seconds a forward" + (f" (factor over {ENCODER_NAMES[base]})" if base else ""))


def _base(rows: list[Row], ranked: tuple[str, ...]) -> str | None:
    arms = {row["arm"] for row in rows if row["status"] == "ok"}
    return next((name for name in ranked if name in arms), None)


def _title(content: Row) -> str:
    settings, model = content["settings"], content["model"]
    return (
        f"{model['name']}, {settings['batch']} x {settings['length']} tokens: "
        "speed against the compression ratio"
    )


def _caption(content: Row) -> str:
    here, versions, git = content["machine"], content["versions"], content["git"]
    commit = (git["commit"] or "none")[:9] + ("+" if git["dirty"] else "")
    return (
        f"{here['cpu']}, {content['settings']['threads']} threads, kernels "
        f"{here['kernels_isa'] or 'not built'}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; weights {content['model']['weights']}; commit {commit}\n"
        "Medians of interleaved rounds, bands and whiskers are quartiles. Cost bound: dense over "
        "compressed multiply-adds."
    )


def main(arguments: list[str] | None = None) -> None:
    """Draw figures from result files."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("result", nargs="+", type=Path)
    for path in parser.parse_args(arguments).result:
        print(draw(results.read(path), path))


if __name__ == "__main__":
    main()
