"""The pictures of quality: of tasks, of embeddings, of decoders, of plans."""

from itertools import cycle
from pathlib import Path
from typing import Any

from ..harness import results
from ..harness.results import Row
from ..harness.style import AMBER, BLUE, BROWN, GREY, INK, NAVY, commit, note, sheet
from .embeddings import METRICS
from .rivals import rivals

COLOURS = {
    "untrained": "#a0aec0", "calibrated": AMBER, "calibrated on more text": BROWN, "trained": BLUE
}  # fmt: skip
VARIANTS = {"full": BLUE, "calibrated only": AMBER, "untrained": "#a0aec0"}
SINGLE = {
    "k=4 alone": "o", "without pre-training": "<", "from initial values": "v", "copy": "D",
    "without adaptation": "^", "mean pooling": "s", "last layer alone": "X", "r=40": "P",
}  # fmt: skip
PLANS = {
    "k=": {"color": AMBER, "marker": "s", "label": "uniform ratios"},
    "plan": {"color": BLUE, "marker": "o", "label": "plans"},
    "fitted": {"color": NAVY, "marker": "^", "label": "plans, plugins fitted to them"},
}
SHOWN = ("cosine", "spearman", "neighbours")


def quality(content: Row, target: Path) -> None:
    """Accuracy against measured speed: lines from slow to fast; ablations are single points."""
    rows = [row for row in content["summary"] if row["speedup"]]
    dense = 100 * rows[0]["dense_accuracy"]
    smaller = rivals(content["costs"])

    def place(row: Row) -> tuple[float, float]:
        return row["speedup"], 100 * row["accuracy"]

    tokens = content["costs"][0]["tokens_a_row"]
    title = f"{content['task']} ({tokens:.0f} tokens a row), {content['model']['name']}"
    places = results.placements(content.get("settings", {}))
    title += f", {places}" if places != "ffn" else ""
    with sheet(target, 1, 1, (6.2, 4.4), title, "") as ((axes,),):
        axes.axhline(dense, color=GREY, lw=1.2, ls="--")
        where: Any = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate("the original", (0.99, dense), color=GREY, fontsize=8, **where)
        for variant, colour in VARIANTS.items():
            line = sorted(results.pick(rows, variant=variant), key=place)
            if line:
                axes.plot(*zip(*map(place, line), strict=True), "o-", color=colour, label=variant)
            for row in line:
                if smaller[row["k"]] is not None:
                    axes.plot(*place(row), "o", color=colour, mfc="white")
            for row in line if variant == "full" else ():
                below: Any = {"ha": "center", "fontsize": 8, "color": INK}
                below["bbox"] = {"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8}
                note(axes, f"k={row['k']}", place(row), (0, -13), **below)
        if any(smaller.values()):
            label = "hollow: does not pay"
            axes.plot([], [], "o", color=GREY, mfc="white", label=label)
        for variant, marker in SINGLE.items():
            for row in results.pick(rows, variant=variant):
                label = variant if "k=" in variant else f"{variant}, k={row['k']}"
                axes.plot(*place(row), marker, color=INK, ms=5, ls="none", label=label)
        axes.set_xlabel("speed-up of the encoder on the dev set, measured")
        axes.set_ylabel("accuracy, %")
        axes.legend(fontsize=7)


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


PLACES = {
    "attention_kv": BLUE, "attention_kv+ffn/2": NAVY, "attention_kv+ffn": "#2f855a", "ffn": BROWN,
    "ffn/2": AMBER, "ffn/3": "#d69e2e",
}  # fmt: skip


def decoder(content: Row, target: Path) -> None:
    """Perplexity over the dense model's, against the cache's memory and the time to first token.

    A point a level: open with untrained plugins, filled with trained ones.
    """
    rows = [row for row in content["rows"] if row.get("perplexity") and row["status"] == "ok"]
    settings, context = content["settings"], str(content["settings"]["contexts"][0])
    several = len(settings["plugins"]) > 1
    title = f"{content['model']['name']}: perplexity behind a compressed prompt"
    caption = (
        f"{content['machine']['cpu']}, {settings['threads']} threads; {settings['sequences']} "
        f"sequences of {context} tokens, the last 64 predicted. Hollow: untrained; labels: k, and "
        f"the window of plain keys. Commit {commit(content)}."
    )
    panels: list[tuple[str, Any]] = [
        ("cache, of HF", lambda row: row["cache_share"]),
        (
            "time to first token, of Hugging Face's",
            lambda row: 1 / row["first"]["speedup"]["median"],
        ),
    ]
    if not settings.get("times", True):
        panels = [
            ("the prompt's cache, of HF", lambda row: row["prompt_share"]),
            ("multiply-adds of the prompt, of HF", lambda row: 1 / (row["bound"] or 1)),
        ]
    with sheet(target, 1, 2, (11, 4.6), title, caption) as (line,):
        for axes, (label, x) in zip(line, panels, strict=True):
            for row in rows:
                colour = PLACES.get(row["where"], GREY)
                for kind, found in row["perplexity"].items():
                    place = x(row), found[context]["over_dense"]
                    mfc = "white" if kind == "untrained" else colour
                    axes.plot(*place, "o", color=colour, mfc=mfc)
                name = f"{row['k']}, {row['window']}" if row["window"] else f"{row['k']}"
                trained = [kind for kind in row["perplexity"] if kind != "untrained"]
                name += f" ({', '.join(trained)})" * (several and bool(trained))
                note(axes, name if row["where"] else "dense", place)
            for where in dict.fromkeys(row["where"] for row in rows if row["where"]):
                axes.plot([], [], "o", color=PLACES.get(where, GREY), label=where)
            axes.set(xlabel=label, ylabel="perplexity over the dense model's", yscale="log")
            for kind in ("major", "minor"):
                getattr(axes.yaxis, f"set_{kind}_formatter")("{x:g}")
            axes.grid()
        if any(row["where"] for row in rows):
            line[0].legend(fontsize=7)


def plans(content: Row, target: Path) -> None:
    """Loss over cost, of plans and of uniform ratios, on the text of the plans and on other."""
    settings = content["settings"]
    rows = results.pick(content["rows"], status="ok")
    where, title = " + ".join(settings["placements"]), "Plans against uniform ratios"
    caption = (
        f"{content['model']['name']}, {where}, plugins: {settings['plugins']}; plans chosen on "
        f"{settings['rows']} rows. Commit {commit(content)}."
    )
    panels = {"loss": "text that plans were chosen on", "unseen": "other text"}
    panels |= {name: f"{name} set" for name in ("dev", "test") if name in rows[0]}
    width = 5.4 * len(panels)
    with sheet(target, 1, len(panels), (width, 4.6), title, caption) as (line,):
        for axes, (name, on) in zip(line, panels.items(), strict=True):
            error = name in ("loss", "unseen")
            for kind, style in PLANS.items():
                mine = [row for row in rows if _kind(row["what"]) == kind]
                mine = [row for row in mine if row["loss"] > 0 or not error]
                if not mine:
                    continue
                mine.sort(key=lambda row: row["cost"])
                points = [row["cost"] for row in mine], [row[name] for row in mine]
                axes.plot(*points, **style)
                for row in mine if kind == "k=" else ():
                    place = row["cost"], row[name]
                    note(axes, row["what"], place, (4, 4), fontsize=10, color=INK)
            axes.set(xlabel="multiply-adds, of the dense encoder's", title=on)
            if error:
                axes.set_yscale("log")
            error_name = "relative squared error of the last hidden state"
            axes.set_ylabel(error_name if error else "right answers, %")
            axes.grid()
            axes.legend()


def _kind(what: str) -> str:
    return "fitted" if what.endswith("fitted") else what[: 2 if what[0] == "k" else 4]


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
                note(axes, f"{place[2]}", place[:2], (3, 3))
    axes.set_xlabel("speed-up of encode, measured")
    axes.set_ylabel(METRICS[metric])
    axes.grid()
