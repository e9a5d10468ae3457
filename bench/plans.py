"""Plans against uniform ratios: the loss of the last hidden state over the cost in multiply-adds.

Plugins are calibrated here, or given, on other text than a plan sees; a plan is chosen on some
rows, and its loss measured on others too. With ``--task`` these are the sentences of a task, and
the points that its model loses stand beside. Losses and costs are measured again in plain PyTorch
and by ``flops.count``; a row that disagrees with its plan has no numbers, and the exit code is 1.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

import variator_kernels as vk

from . import internals, plot
from .cases import models
from .harness import machine, options, results, tables
from .harness.results import Row
from .neurons import tokenized
from .quality import originals, tasks, text
from .quality.errors import Batches, error

LEAST_TOKENS = 16
"""Of a sentence that plugins are calibrated and plans chosen on: in shorter ones no group of 8 and
few of 4 are full."""
TOLERANCE = 1e-3
"""Relative, of losses: the plan's come from blocks that run one at a time."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("plans", __doc__)
    made.add_argument("--model", default="minilm", help="minilm, or a folder with a tokenizer")
    made.add_argument("--task", choices=tuple(tasks.TASKS), help="of a model fine-tuned on it")
    made.add_argument("--plugins", type=Path, help="folder of plugins; default: calibrate some")
    made.add_argument("--placements", type=options.words, default=["ffn"], help="default ffn")
    made.add_argument("--ratios", type=options.ratios, default=[2, 4, 8], help="default 2,4,8")
    made.add_argument(
        "--data", type=Path, default=machine.DATA, help="folder with wikitext2/, sst2/"
    )
    made.add_argument("--calibrate", type=options.count, default=300, help="rows; default 300")
    made.add_argument("--rows", type=options.count, default=32, help="a plan sees; default 32")
    made.add_argument("--length", type=options.count, default=128, help="tokens a row; default 128")
    made.add_argument("--batch", type=options.count, default=16, help="rows a batch; default 16")
    made.add_argument(
        "--fitted", action="store_true", help="each plan's plugins calibrated for it, besides"
    )
    return made


class Case(NamedTuple):
    """A model and its text: what plugins are calibrated on, what a plan sees, other rows, and a
    task's rows with their answers."""

    model: Any
    calibration: Batches
    seen: Batches
    unseen: Batches
    tokenizer: Any
    answers: dict[str, Any]
    """By split: :class:`Rows`, and what tells a right answer; none without a task."""


def paragraphs(args: argparse.Namespace, architecture: Any) -> Case:
    """Of articles."""
    training, held_out = text.training(args.data), text.held_out(args.data)
    long = [line for line in training if len(line.split()) >= text.LEAST_WORDS]
    step = max(1, len(long) // args.calibrate)
    parts = long[::step][: args.calibrate], held_out[: args.rows], held_out[-args.rows :]
    if len(held_out) < 2 * args.rows:
        raise ValueError(f"rows must be at most {len(held_out) // 2}, got {args.rows}")
    words = architecture.tokenizer or models.minilm()
    calibration, seen, unseen = (tokenized(part, words, args.length, args.batch) for part in parts)
    model = models.encoder(architecture, torch.float32)
    return Case(model, calibration, seen, unseen, words, {})


def sentences(args: argparse.Namespace) -> Case:
    """Of a task: training rows, and the dev set as the other rows."""
    task = tasks.TASKS[args.task]
    model, tokenizer = originals.read(Path(args.model), task=True)
    train, _ = tasks.load(args.data, task, "train", model, tokenizer, LEAST_TOKENS)
    picked = train.spread(args.calibrate + args.rows)
    step = len(picked) // args.rows
    seen = picked[::step][: args.rows] if step > 1 else []
    if not seen:
        raise ValueError(f"rows must be less than half of {len(train)} rows, got {args.rows}")
    chosen = {id(row) for row in seen}
    answers = {
        split: tasks.load(args.data, task, split, model, tokenizer)
        for split in tasks.held_out(args.data, task)
    }
    parts = [row for row in picked if id(row) not in chosen], seen, answers["dev"][0].rows
    calibration, seen, unseen = (padded(rows, tokenizer, args.batch) for rows in parts)
    return Case(model, calibration, seen, unseen, tokenizer, answers)


def padded(rows: list[Any], tokenizer: Any, batch: int) -> Batches:
    """Rows of similar length together."""
    ids = sorted((row["input_ids"] for row in rows), key=len)
    starts = range(0, len(ids), batch)
    pad: Any = tokenizer.pad
    return [dict(pad({"input_ids": ids[i : i + batch]}, return_tensors="pt")) for i in starts]


def plugged(case: Case, args: argparse.Namespace) -> None:
    """Put the plugins that are asked for into the model."""
    if args.plugins:
        vk.load_plugins(case.model, args.plugins)
        return
    vk.patch(case.model, 1, args.ratios, placements=args.placements)
    vk.calibrate(case.model, case.calibration)


def loss(model: nn.Module, batches: Batches, level: Any) -> float:
    """The relative squared error of the last hidden state at a level, in plain PyTorch."""
    return error(model, batches, None, level)


def accuracies(case: Case, level: Any) -> Row:
    """Percent of right answers, by split."""
    with vk.use_ratio(case.model, level):
        return {
            split: 100 * originals.accuracy(case.model, case.tokenizer, rows, correct)
            for split, (rows, correct) in case.answers.items()
        }


def cost(model: nn.Module, batches: Batches, level: Any) -> float:
    """Multiply-adds at a level over those of the dense encoder."""
    counts = [
        vk.flops.count(model, length=batch["attention_mask"].sum(1).tolist(), ratio=level)
        for batch in batches
    ]
    used = sum(count.multiply_adds.total for count in counts)
    return used / sum(count.dense_multiply_adds.total for count in counts)


def row(case: Case, what: str, level: Any) -> Row:
    """Of one level, measured."""
    model = case.model
    return {
        "what": what, "status": "ok", "cost": cost(model, case.seen, level),
        "loss": loss(model, case.seen, level), "unseen": loss(model, case.unseen, level),
        **accuracies(case, level),
    }  # fmt: skip


def agrees(plan: vk.Plan, made: Row) -> bool:
    """What a plan says of itself is what was measured again."""
    near = abs(plan.loss - made["loss"]) <= TOLERANCE * max(made["loss"], 1e-9)
    return near and abs(plan.cost - made["cost"]) <= 1e-9 and made["cost"] <= plan.limit + 1e-9


def alone(case: Case, k: int) -> Row:
    """The loss with one site compressed, of each: where they are alike a plan has little to win."""
    levels = internals.singly(case.model, k) if k > 1 else []
    return {"alone": [loss(case.model, case.seen, level) for level in levels]} if levels else {}


@torch.no_grad()
def fitted(case: Case, what: str, plan: vk.Plan) -> Row:
    """Of a plan whose plugins are calibrated behind one another; they are put back."""
    plugins = vk.plugin_parameters(case.model)
    before = [parameter.clone() for parameter in plugins]
    vk.calibrate(case.model, case.calibration, [plan])
    found = row(case, what, plan)
    for parameter, value in zip(plugins, before, strict=True):
        parameter.copy_(value)
    return found


def compared(found: Row, base: Row | None) -> Row:
    """With the losses over those of a uniform ratio."""
    if base is None:
        return found
    both = {name: found[of] / base[of] for name, of in RATIOS.items()}
    return {**found, "against": base["what"], **both}


RATIOS = {"ratio": "loss", "unseen_ratio": "unseen"}


def measure(case: Case, also_fitted: bool, console: Console) -> list[Row]:
    """Uniform ratios; then a plan at the cost of each of them, and between two."""
    model = case.model
    ratios = internals.state(model).ratios
    uniform = [
        row(case, f"k={k}", internals.state(model).everywhere(k)) | alone(case, k)
        for k in (1, *ratios)
    ]
    made = uniform[1:] if not case.answers else list(uniform)
    for before, after in pairwise(uniform):
        for limit, base in (((before["cost"] + after["cost"]) / 2, None), (after["cost"], after)):
            limit = min(limit, 1.0)  # plugins of a small model may cost more than they save
            plan = vk.plan(model, case.seen, cost=limit, measure="flops")
            console.print(str(plan), highlight=False)
            found = row(case, f"plan at {limit:.3f}", plan)
            if not agrees(plan, found):
                reason = f"the plan says loss {plan.loss:.6g} and cost {plan.cost:.6g}, measured "
                reason += f"are {found['loss']:.6g} and {found['cost']:.6g}"
                made.append({"what": found["what"], "status": "failed", "reason": reason})
                continue
            level = {"level": {k: list(v.values()) for k, v in plan.by_placement.items()}}
            made.append(compared(found | level, base))
            if also_fitted:
                found = fitted(case, f"{found['what']}, fitted", plan)
                made.append(compared(found | level, base))
    return made


def _range(found: list[float] | None) -> str:
    return f"{min(found):.4f} to {max(found):.4f}" if found else ""


COLUMNS = [
    tables.key("level", "what"),
    tables.number("cost", lambda row: row["cost"], ".3f"),
    tables.number("loss", lambda row: row["loss"], ".4f"),
    tables.number("on unseen text", lambda row: row["unseen"], ".4f"),
    tables.Column("one site alone", lambda row: _range(row.get("alone"))),
    tables.Column("against", lambda row: row.get("against", "")),
    tables.number("loss, of that", lambda row: row.get("ratio")),
    tables.number("on unseen text", lambda row: row.get("unseen_ratio")),
    tables.number("dev, %", lambda row: row.get("dev"), ".1f"),
    tables.number("test, %", lambda row: row.get("test"), ".1f"),
]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON and PNG; 1 if a check failed."""
    made = parser()
    args = made.parse_args(arguments)
    options.set_threads(args)
    settings = options.settings(args, "data", "model")
    settings["plugins"] = args.plugins.name if args.plugins else "calibrated"
    console = options.screen()
    with options.refusals(made):
        architecture = models.architecture(args.model)
        case = sentences(args) if args.task else paragraphs(args, architecture)
        plugged(case, args)
        settings["placements"] = list(internals.state(case.model).method.config.placements)
        content = results.result("plans", settings, options.describe(architecture))
        content["rows"] = measure(case, args.fitted, console)
    named = (args.task, architecture.name) if args.task else (architecture.name,)
    name = "_".join(("plans", *named, *settings["placements"]))
    table = tables.screen("Plans and uniform ratios", COLUMNS, content["rows"])
    path = options.path_of(args, f"{name}_{settings['plugins']}")
    return options.finish(content, path, console, table, draw=plot.draw)


if __name__ == "__main__":
    sys.exit(main())
