"""The table and the picture of all methods."""

from pathlib import Path
from statistics import median

from ..harness import tables
from ..harness.results import Row, pick
from ..harness.style import AMBER, BLUE, BROWN, GREY, NAVY, commit, note, sheet

OURS = {
    "plugins": BLUE, "plugins, keys too": NAVY, "plugins at keys": BLUE, "int8": "#63b3ed",
    "projected": "#2f855a", "projected, plugins": "#9ae6b4",
    "projected, plugins at keys": "#9ae6b4",
}  # fmt: skip
RIVALS = (AMBER, BROWN, "#805ad5", "#d53f8c", "#e53e3e", "#744210", "#b794f4")
"""Dotted in the picture."""


def summary(content: Row) -> list[Row]:
    """A row a method and setting: what it costs, and the median of its scores over seeds."""
    made = []
    for cost in content["costs"]:
        key = {name: cost[name] for name in ("method", "setting")}
        found = pick(content["rows"], **key)
        row = {**cost, "seeds": len(found)}
        for split in ("dev", "test"):
            scores = [r["scores"][split] for r in found if split in r["scores"]]
            row[split] = median(scores) if scores else None
            row[f"{split}_seeds"] = scores
        made.append(row)
    return made


def columns(score: str) -> list[tables.Column]:
    """Of the table on the screen and in Markdown."""
    percent, form = (100, ".1f") if score == "accuracy" else (1, ".2f")

    def of(split: str) -> tables.Column:
        def read(row: Row) -> float | None:
            return None if row[split] is None else percent * row[split]

        return tables.number(f"{score}, {split}", read, form)

    return [
        tables.key("method", "method"),
        tables.key("setting", "setting"),
        of("dev"),
        of("test"),
        tables.key("seeds", "seeds"),
        tables.number("parameters added", lambda row: row["added"], "+.1%"),
        tables.number("multiply-adds left", lambda row: row["multiply_adds"], ".0%"),
        tables.number("speed-up", lambda row: row["speedup"]["median"]),
        tables.mib("weights, MiB", "weights_bytes", ".0f"),
        tables.mib("peak of a forward, MiB", "peak_bytes"),
    ]


def methods(content: Row, target: Path) -> None:
    """The score over the measured speed: a line a method, medians and ranges over seeds."""
    settings, score = content["settings"], content["score"]
    split = "dev" if score == "accuracy" else "test"
    rows = [row for row in pick(content["summary"], status="ok") if row[split] is not None]
    factor = 100 if score == "accuracy" else 1
    title = f"{content['task']}, {content['model']['name']}: {score} against measured speed"
    caption = (
        f"{settings['steps']} steps of {settings['batch']} rows each, medians and ranges of "
        f"{settings['seeds']} seeds; {content['machine']['cpu']}, {settings['threads']} threads. "
        f"Commit {commit(content)}."
    )
    names, spare = list(dict.fromkeys(row["method"] for row in rows)), iter(RIVALS * 3)
    with sheet(target, 1, 1, (8.6, 5.4), title, caption) as ((axes,),):
        for name in names:
            some = sorted(pick(rows, method=name), key=lambda row: row["speedup"]["median"])
            base = name.removesuffix(", int8")
            colour = OURS.get(base) or (GREY if base.startswith("original") else next(spare))
            x = [row["speedup"]["median"] for row in some]
            y = [factor * row[split] for row in some]
            seeds = [[factor * s for s in row[f"{split}_seeds"]] for row in some]
            spread = [[v - min(s) for v, s in zip(y, seeds, strict=True)],
                      [max(s) - v for v, s in zip(y, seeds, strict=True)]]  # fmt: skip
            own = base in OURS or base.startswith("original")
            style = "--" if name != base else "-" if own else ":"
            axes.errorbar(x, y, spread, fmt=f"o{style}", color=colour, label=name, capsize=2)
            for place, row in zip(zip(x, y, strict=True), some, strict=True):
                note(axes, row["setting"], place, fontsize=6.5)
        axes.set_xlabel(f"speed-up over the original as Hugging Face runs it, {split} set")
        axes.set_ylabel(f"{score}, {split}" + (", %" if factor == 100 else ""))
        if factor == 1:
            axes.set_yscale("log")
        axes.grid()
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
