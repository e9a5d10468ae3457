"""``bench.quality_vs_k --task embeddings``: a compressed model's embeddings against its own."""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

import variator_kernels as vk
from variator_kernels.train import data

from .. import internals
from ..harness import options, results, tables
from ..harness.results import Row
from . import embedders, encoding, tasks, text
from .embedders import TARGETS, VARIANTS, Made, Recipe
from .recipe import label
from .similarity import NEIGHBOURS, compare

NAME = "embeddings"
QUICK = 24
"""Texts of a kind for a dry run."""
METRICS = {
    "cosine": "cosine to the original's, mean", "cosine_q05": "5 % quantile",
    "spearman": "Spearman of all similarities", "neighbours": "10 neighbours kept",
}  # fmt: skip


def chosen(args: argparse.Namespace) -> list[str]:
    """The variants to make; ``ValueError`` for what there is not."""
    names = list(VARIANTS) if args.variants is None else args.variants
    options.check("variants", names, VARIANTS)
    both = {made.variant for made in embedders.given(args.plugins)} & set(names)
    if both:
        raise ValueError(f"plugins must have labels of their own, {both.pop()!r} is a variant too")
    return names


def check(args: argparse.Namespace, base: str) -> None:
    """``ValueError`` or ``ImportError`` for what cannot run, before anything is made."""
    chosen(args)
    model, ratios = embedders.load(base), _ratios(args)
    for made in embedders.given(args.plugins):
        vk.load_plugins(model, made.folder)
        missing = sorted(set(ratios) - set(internals.state(model).ratios))
        vk.unpatch(model)
        if missing:
            raise ValueError(f"plugins {made.folder} have no ratio {missing[0]}: set --ratios")
    for kind, lines in measured(args.data, args.quick).items():
        if len(lines) <= NEIGHBOURS:
            raise ValueError(f"data must hold more {kind} to measure on, got {len(lines)}")


def _ratios(args: argparse.Namespace) -> tuple[int, ...]:
    return tuple(args.ratios or embedders.RATIOS)


def measured(folder: Path, quick: bool) -> dict[str, list[str]]:
    """The texts that no plugins were trained on."""
    dev = data.read(str(folder / tasks.TASKS["sst2"].dev), ("sentence",))
    found = {"paragraphs": text.held_out(folder), "sst2": [r.values["sentence"] for r in dev]}
    return {kind: lines[:QUICK] if quick else lines for kind, lines in found.items()}


def run(
    args: argparse.Namespace, base: str, work: Path, recipe: Recipe, console: Console,
    draw: Callable[[Row, Path], Path],
) -> Row:  # fmt: skip
    """Makes the variants, compares, and times ``encode``."""
    ratios = _ratios(args)
    texts = measured(args.data, args.quick)
    sets = _all(args, base, work, recipe, ratios, console)
    settings = {"threads": args.threads, "rounds": args.rounds, "ratios": list(ratios)}
    settings["placements"] = list(args.placements[0])
    model = {"name": args.model if args.model == "minilm" else Path(args.model).name}
    content = results.result("quality_embeddings", settings | embedders.settings(recipe), model)
    content["texts"] = {kind: len(lines) for kind, lines in texts.items()}
    console.print(f"{NAME}: comparing {len(sets)} sets of plugins")
    content["rows"] = compared(base, sets, texts, ratios)
    parts = ("quality_embeddings", model["name"], label(args.placements[0]))
    path = options.path_of(args, "_".join(filter(None, parts)))
    results.write(path, content)
    content["costs"] = encoding.measure(
        base, [made.folder for made in sets], texts, ratios, args.rounds
    )
    content["summary"] = summary(content["rows"], content["costs"])
    table = tables.screen("medians over seeds", columns(content), content["summary"], "text")
    options.finish(content, path, console, table, draw=draw)
    return content


def _all(
    args: argparse.Namespace, base: str, work: Path, recipe: Recipe, ratios: tuple[int, ...],
    console: Console,
) -> list[Made]:  # fmt: skip
    made = []
    for variant in chosen(args):
        seeds = (args.seeds or 1) if variant == "trained" else 1
        for keep_first in (0, 1) if args.keep_first is None else args.keep_first:
            for seed in range(seeds):
                console.print(f"{NAME}: {variant}, keep_first={keep_first}, seed {seed}")
                options_ = (base, args.data, work, recipe, variant, ratios)
                made.append(embedders.make(*options_, args.placements[0], keep_first, seed))
    return made + embedders.given(args.plugins)


def compared(
    base: str, sets: list[Made], texts: dict[str, list[str]], ratios: tuple[int, ...]
) -> list[Row]:
    """A row a set of plugins, ratio and kind of text."""
    model = embedders.load(base)
    original = {kind: embedders.encode(model, lines) for kind, lines in texts.items()}
    rows: list[Row] = []
    for made in sets:
        vk.load_plugins(model, made.folder)
        kept, bottleneck, placements = embedders.kept(model)
        for k in ratios:
            for kind, lines in texts.items():
                with vk.use_ratio(model, k):
                    found = embedders.encode(model, lines)
                row = {"text": kind, "variant": made.variant, "kept": kept, "k": k}
                row |= {"seed": made.seed, "bottleneck": bottleneck}
                row["placements"] = list(placements)
                rows.append(row | compare(found, original[kind]))
        vk.unpatch(model)
    return rows


def summary(rows: list[Row], costs: list[Row]) -> list[Row]:
    """Medians over seeds, with cost and speed beside them; texts in their order."""
    made: list[Row] = []
    names = ("text", "variant", "kept", "bottleneck", "k")
    order = {cost["text"]: place for place, cost in reversed(list(enumerate(costs)))}
    groups = {(*(r[name] for name in names), *r["placements"]): r["placements"] for r in rows}
    for group in sorted(groups, key=lambda group: order[group[0]]):
        wanted: Row = dict(zip(names, group, strict=False)) | {"placements": groups[group]}
        found = results.pick(rows, **wanted)
        row = wanted | {name: statistics.median(r[name] for r in found) for name in METRICS}
        del wanted["variant"]
        (cost,) = results.pick(costs, **wanted)
        row |= {"seeds": len(found), "tokens_a_row": cost["tokens_a_row"]}
        row["multiply_adds_left"] = cost["multiply_adds_left"]
        made.append(row | {"speedup": cost.get("speedup")})
    return made


def columns(content: Row) -> list[tables.Column]:
    """Of the tables on the screen and in the documentation."""

    def metric(name: str) -> tables.Column:
        def cell(row: Row) -> str:
            limit = target(content, row).get(name)
            return f"{row[name]:.3f}" + ("" if limit is None else f" (target {limit})")

        return tables.Column(METRICS[name], cell)

    return [
        tables.Column("text", lambda row: f"{row['text']}, {row['tokens_a_row']:.0f} tokens"),
        tables.key("plugins", "variant"),
        tables.Column("placements", results.placements),
        tables.key("kept whole", "kept"),
        tables.key("k", "k"),
        *map(metric, METRICS),
        tables.number("multiply-adds left", lambda row: row["multiply_adds_left"], ".0%"),
        tables.Column("speed-up of encode", lambda row: tables.times(row["speedup"])),
    ]


def target(content: Row, row: Row) -> dict[str, float]:
    """What these plugins must reach."""
    of = (content["model"]["name"], row["variant"], row["kept"], results.placements(row))
    if of != ("minilm", "trained", "first 1", "ffn"):
        return {}
    return TARGETS.get((row["text"], row["k"]), {})
