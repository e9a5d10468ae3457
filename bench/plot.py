"""Every figure, from its result file: ``python -m bench.plot RESULT.json`` draws it again."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from .harness import results
from .harness.results import Row
from .harness.style import (
    AMBER,
    BLUE,
    BROWN,
    DENSE,
    ENCODER_NAMES,
    GREY,
    NAVY,
    bars,
    commit,
    over_k,
    sheet,
)  # fmt: skip
from .methods.figure import methods
from .peers.figure import peers
from .projected.figure import projected
from .quality import figure

STYLES: dict[str, dict[str, Any]] = {
    "reference": {"color": AMBER, "marker": "s", "label": "plain PyTorch, eager"},
    "reference-compiled": {"color": BROWN, "marker": "D", "label": "plain PyTorch, compiled"},
    "ours": {"color": BLUE, "marker": "o", "label": "variator_kernels"},
    "ours-compiled": {"color": NAVY, "marker": "^", "label": "variator_kernels, compiled"},
}
PLACES = {
    "ffn + attention_kv": "#2f855a", "ffn + attention": "#805ad5", "attention_kv": "#b83280",
    "attention": "#c05621",
}  # fmt: skip
"""Colours; at FFNs alone it is the arm's."""
ACTIVE = {
    "union": {"color": GREY, "marker": "v", "label": "any token of the group (union)"},
    "merged": {"color": BLUE, "marker": "o", "label": "the merged vector"},
    "token": {"color": AMBER, "marker": "s", "label": "one token"},
    "intersection": {"color": BROWN, "marker": "^", "label": "every token (intersection)"},
}
_OF_UNION = "of the union, active in the merged vector"
_OF_MERGED = "of the merged vector's, active in every token"
OVERLAP = {
    "union_kept": {"color": GREY, "marker": "v", "label": _OF_UNION},
    "merged_in_intersection": {"color": BROWN, "marker": "^", "label": _OF_MERGED},
}
LINES = {"untrained": "-", "trained": "--"}


def speed(content: Row, target: Path) -> None:
    """A row of panels a scope, a panel a dtype."""
    rows, settings, versions = content["rows"], content["settings"], content["versions"]
    scopes = [name for name in ("sublayer", "encoder") if results.pick(rows, case=name)]
    dtypes = [d for d in settings["dtype"] if results.pick(rows, dtype=d)]
    here, model = content["machine"], content["model"]
    title = (
        f"{model['name']}, {settings['batch']} x {settings['length']} tokens: "
        "speed against the compression ratio"
    )
    caption = (
        f"{here['cpu']}, {settings['threads']} threads, kernels "
        f"{here['kernels_isa'] or 'not built'}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; weights {model['weights']}; commit {commit(content)}\n"
        "Medians of interleaved rounds, bands and whiskers are quartiles. Cost bound: dense over "
        "compressed multiply-adds."
    )
    size = (max(5.4 * len(dtypes), 7), 3.9 * max(len(scopes), 1) + 0.9)
    with sheet(target, len(scopes), len(dtypes), size, title, caption) as grid:
        for line, scope in zip(grid, scopes, strict=False):
            for axes, dtype in zip(line, dtypes, strict=False):
                panel = results.pick(rows, case=scope, dtype=dtype)
                single = len({row["k"] for row in panel if row["k"]}) < 2
                (_bars if scope == "encoder" and single else _curves)(axes, panel, dtype)


def _base(rows: list[Row], *ranked: str) -> str:
    arms = {row["arm"] for row in rows if row["status"] == "ok"}
    return next((name for name in ranked if name in arms), "")


def _curves(axes: Axes, rows: list[Row], dtype: str) -> None:
    """Speed-ups over k, a line an arm and set of placements, with quartiles and cost bounds."""
    base = _base(rows, "dense-packed", "hf-sdpa", "hf")
    names = {"dense-packed": "dense, weights packed", "hf": "dense, Hugging Face"}
    name = names.get(base) or ENCODER_NAMES.get(base)
    plugged = [row for row in rows if row["k"]]
    places = list(dict.fromkeys(map(results.placements, plugged)))
    for place in places:
        own = [row for row in plugged if results.placements(row) == place]
        bounds = sorted({(row["k"], row["bound"]) for row in own})
        label = "cost bound" if place == places[0] else None
        colour = PLACES.get(place, GREY)
        axes.plot(*zip(*bounds, strict=True), "--", color=colour, lw=1.3, label=label)
        for arm, style in STYLES.items():
            cells = [row for row in own if row["arm"] == arm and results.speedup(row, base)]
            k = [row["k"] for row in cells]
            quartiles = ([row["speedup"][base][q] for row in cells] for q in ("q1", "median", "q3"))
            low, mid, high = quartiles
            style = style | ({"color": PLACES[place]} if place in PLACES else {})
            if places != ["ffn"]:
                style["label"] += f", {place}"
            if cells:
                axes.fill_between(k, low, high, color=style["color"], alpha=0.16, lw=0)
                axes.plot(k, mid, **style)
    axes.axhline(1, color=GREY, lw=0.8)
    over_k(axes, sorted({row["k"] for row in plugged}))
    axes.set_ylim(bottom=0)
    scope = "Whole encoder" if results.pick(rows, case="encoder") else "FFN sublayer"
    axes.set_title(f"{scope}, {dtype}")
    axes.set_ylabel(f"speed-up over {name}" if name else "no dense baseline")
    below: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
    axes.legend(fontsize=8.5, **below if len(places) > 1 else {"loc": "upper left"})


def _bars(axes: Axes, rows: list[Row], dtype: str) -> None:
    """Time of the whole encoder by arm, with quartiles, and the speed-up over SDPA."""
    measured = [row for row in rows if row["status"] == "ok"]
    base, cells = _base(rows, "hf-sdpa", "hf"), []
    for row in measured:
        k, places = row["k"], results.placements(row)
        name = str(ENCODER_NAMES.get(row["arm"], row["arm"])) + (f", k={k}" if k else "")
        if k and any(results.placements(other) in PLACES for other in measured):
            name = name.replace("\n", " ") + f"\n{places}"
        own = PLACES.get(places) or STYLES.get(row["arm"], {}).get("color") or BLUE
        cells.append((name, own if k is not None else DENSE, row))
    bars(axes, cells, base)
    axes.set_title(f"Whole encoder, {dtype}")
    axes.set_xlabel("seconds a forward" + (f" (factor over {ENCODER_NAMES[base]})" if base else ""))


def neurons(content: Row, target: Path) -> None:
    """A row of panels a model: active neurons, and their overlaps, over k."""
    rows, settings = results.pick(content["rows"], status="ok", layer="all"), content["settings"]
    names = list(dict.fromkeys(row["model"] for row in rows))
    caption = (
        f"{settings['rows']} paragraphs of {settings['data']}, at most {settings['length']} tokens "
        f"each; a neuron is active if the input of its activation function is above "
        f"{settings['threshold']:g}.\nTokens and merged vectors as the compressed model meets "
        f"them; whole groups only; all layers together. Commit {commit(content)}."
    )
    size, title = (
        (10.8, 4.2 * max(len(names), 1) + 0.7),
        "FFN neurons that merged vectors switch on",
    )
    with sheet(target, len(names), 2, size, title, caption) as grid:
        for line, name in zip(grid, names, strict=False):
            mine = results.pick(rows, model=name)
            title = f"{name}, weights {mine[0]['weights']}"
            _shares(line[0], mine, ACTIVE, f"{title}: active neurons", "% of the FFN's neurons")
            _shares(line[1], mine, OVERLAP, f"{title}: overlap", "%")


def _shares(axes: Axes, rows: list[Row], styles: dict[str, Any], title: str, label: str) -> None:
    """Shares over k; a line style for untrained and one for trained plugins."""
    kinds = {kind: results.pick(rows, plugins=kind) for kind in LINES}
    for kind, cells in kinds.items():
        for share, style in styles.items() if cells else ():
            k, values = [row["k"] for row in cells], [100 * row[share] for row in cells]
            axes.plot(
                k, values, LINES[kind], **style | ({"label": None} if kind == "trained" else {})
            )
    if all(kinds.values()):
        for kind, line in LINES.items():
            axes.plot([], [], line, color=GREY, label=f"{kind} plugins")
    over_k(axes, sorted({row["k"] for row in rows}))
    axes.set_ylim(0, None)
    axes.set_title(title)
    axes.set_ylabel(label)
    columns = 2 if len(styles) > 2 else 1  # these have long names
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)


def gpu(content: Row, target: Path) -> None:
    """The curve over k, and every target beside its limit; what was not measured is said."""
    title = "dry run without a GPU: no figure here is a GPU's"
    if not content["dry_run"]:
        title = f"{content['machine']['gpu']}, {content['versions']['torch']}"
    found = [row for row in content.get("verdicts", []) if row["value"] is not None]
    with sheet(target, 1, 2, (13, 5), title, "") as ((curve, targets),):
        rows = [row for row in content["rows"] if row["case"] == "curve" and row["status"] == "ok"]
        for arm in ("hf", "reference", "ours") if rows else ():
            some = results.pick(rows, arm=arm)
            dense = {"color": GREY, "marker": "D", "label": "Hugging Face's, dense"}
            times = [(row["k"] or 1, row["median"] * 1e6) for row in some]
            if times:
                curve.plot(*zip(*times, strict=True), **STYLES.get(arm, dense))
        floors = sorted((row["k"], row["floor"] * 1e6) for row in rows if row["k"])
        if floors:
            curve.plot(*zip(*floors, strict=True), "--", color="k", label="floor")
            over_k(curve, [1, *dict.fromkeys(k for k, _ in floors)])
            curve.set(yscale="log", ylabel="microseconds, CUDA-graph replay")
            curve.legend()
        else:
            curve.text(0.5, 0.5, "not measured", ha="center")
        curve.set_title("FFN sublayer against the compression ratio")
        names = [f"{row['where']}\n{row['what']}" for row in found]
        colours = [BLUE if row["met"] else BROWN for row in found]
        targets.barh(names, [row["value"] / row["limit"] for row in found], color=colours)
        targets.tick_params(axis="y", labelsize=6)
        targets.axvline(1, color="k", lw=0.8)
        targets.set_title("Measured over limit (for floor and memory, less is better)")


FIGURES: dict[str, Callable[[Row, Path], None]] = {
    "speed_vs_k": speed,
    "neurons": neurons,
    "peers": peers,
    "plans": figure.plans,
    "quality_vs_k": figure.quality,
    "quality_embeddings": figure.embeddings,
    "decoder": figure.decoder,
    "gpu_report": gpu,
    "projected": projected,
    "methods": methods,
}


def draw(content: Row, path: Path) -> Path:
    """Draw a result beside its JSON."""
    target = path.with_suffix(".png")
    FIGURES[content["benchmark"]](content, target)
    return target


def main(arguments: list[str] | None = None) -> None:
    """Draw figures from result files."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("result", nargs="+", type=Path)
    for path in parser.parse_args(arguments).result:
        print(draw(results.read(path), path))


if __name__ == "__main__":
    main()
