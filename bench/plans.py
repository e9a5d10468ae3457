"""Plans against uniform ratios: the loss of the last hidden state over the cost in multiply-adds.

Plugins are calibrated here, or given, on text of other articles than a plan sees; a plan is chosen
on some paragraphs, and its loss measured on others too. Losses and costs are measured again in
plain PyTorch and by ``flops.count``; a row that disagrees with its plan has no numbers, and the
exit code is 1.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import variator_kernels as vk

from . import internals, plot
from .cases import models
from .harness import machine, options, results, tables
from .harness.results import Row
from .neurons import tokenized
from .quality import text

Batches = list[dict[str, Tensor]]
TOLERANCE = 1e-3
"""Relative, of losses: the plan's come from blocks that run one at a time."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("plans", __doc__)
    made.add_argument("--model", default="minilm", help="minilm, or a folder with a tokenizer")
    made.add_argument("--plugins", type=Path, help="folder of plugins; default: calibrate some")
    made.add_argument("--placements", type=options.words, default=["ffn"], help="default ffn")
    made.add_argument("--ratios", type=options.ratios, default=[2, 4, 8], help="default 2,4,8")
    made.add_argument("--data", type=Path, default=machine.DATA, help="folder with wikitext2/")
    made.add_argument("--calibrate", type=options.count, default=300, help="paragraphs; 300")
    made.add_argument("--rows", type=options.count, default=32, help="paragraphs a plan sees; 32")
    made.add_argument("--length", type=options.count, default=128, help="tokens a row; default 128")
    made.add_argument("--batch", type=options.count, default=16, help="rows a batch; default 16")
    made.add_argument("--threads", type=options.count, help="default: as many as torch takes")
    options.add_output(made)
    return made


def plugged(model: nn.Module, calibration: Batches, args: argparse.Namespace) -> nn.Module:
    """The model with the plugins that are asked for."""
    if args.plugins:
        vk.load_plugins(model, args.plugins)
        return model
    vk.patch(model, 1, args.ratios, placements=args.placements)
    vk.calibrate(model, calibration)
    return model


@torch.no_grad()
def loss(model: nn.Module, batches: Batches, level: Any) -> float:
    """The relative squared error of the last hidden state at a level, in plain PyTorch."""
    squared = total = 0.0
    for batch in batches:
        real = batch["attention_mask"].bool()
        with vk.use_ratio(model, 1):
            dense = model(**batch).last_hidden_state[real].double()
        with vk.use_ratio(model, level):
            got = model(**batch).last_hidden_state[real].double()
        squared += float((got - dense).square().sum())
        total += float(dense.square().sum())
    return squared / total


def cost(model: nn.Module, batches: Batches, level: Any) -> float:
    """Multiply-adds at a level over those of the dense encoder."""
    counts = [
        vk.flops.count(model, length=batch["attention_mask"].sum(1).tolist(), ratio=level)
        for batch in batches
    ]
    used = sum(count.multiply_adds.total for count in counts)
    return used / sum(count.dense_multiply_adds.total for count in counts)


def row(model: nn.Module, seen: Batches, unseen: Batches, what: str, level: Any) -> Row:
    """Of one level, measured."""
    return {
        "what": what, "status": "ok", "cost": cost(model, seen, level),
        "loss": loss(model, seen, level), "unseen": loss(model, unseen, level),
    }  # fmt: skip


def agrees(plan: vk.Plan, made: Row) -> bool:
    """What a plan says of itself is what was measured again."""
    near = abs(plan.loss - made["loss"]) <= TOLERANCE * max(made["loss"], 1e-9)
    return near and abs(plan.cost - made["cost"]) <= 1e-9 and made["cost"] <= plan.limit + 1e-9


def measure(model: nn.Module, seen: Batches, unseen: Batches, console: Console) -> list[Row]:
    """Uniform ratios; then a plan at the cost of each of them, and between two."""
    ratios = internals.ratios(model)
    uniform = [
        row(model, seen, unseen, f"k={k}", internals.everywhere(model, k)) for k in (1, *ratios)
    ]
    made = uniform[1:]
    for before, after in pairwise(uniform):
        for limit, base in (((before["cost"] + after["cost"]) / 2, None), (after["cost"], after)):
            limit = min(limit, 1.0)  # plugins of a small model may cost more than they save
            plan = vk.plan(model, seen, cost=limit, measure="flops")
            console.print(str(plan), highlight=False)
            found = row(model, seen, unseen, f"plan at {limit:.3f}", plan)
            if not agrees(plan, found):
                reason = f"the plan says loss {plan.loss:.6g} and cost {plan.cost:.6g}, measured "
                reason += f"are {found['loss']:.6g} and {found['cost']:.6g}"
                made.append({"what": found["what"], "status": "failed", "reason": reason})
                continue
            found |= {"level": {k: list(v.values()) for k, v in plan.by_placement.items()}}
            if base is not None:
                found |= {"against": base["what"], "ratio": found["loss"] / base["loss"]}
                found |= {"unseen_ratio": found["unseen"] / base["unseen"]}
            made.append(found)
    return made


COLUMNS = [
    tables.key("level", "what"),
    tables.number("cost", lambda row: row["cost"], ".3f"),
    tables.number("loss", lambda row: row["loss"], ".4f"),
    tables.number("on unseen text", lambda row: row["unseen"], ".4f"),
    tables.Column("against", lambda row: row.get("against", "")),
    tables.number("loss, of that", lambda row: row.get("ratio")),
    tables.number("on unseen text", lambda row: row.get("unseen_ratio")),
]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON and PNG; 1 if a check failed."""
    made = parser()
    args = made.parse_args(arguments)
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)
    hidden = ("output", "publish", "data", "plugins", "model")
    settings = {name: value for name, value in vars(args).items() if name not in hidden}
    settings["plugins"] = args.plugins.name if args.plugins else "calibrated"
    console = options.screen()
    try:
        architecture = models.architecture(args.model)
        model = models.encoder(architecture, torch.float32)
        training, held_out = text.training(args.data), text.held_out(args.data)
        long = [line for line in training if len(line.split()) >= text.LEAST_WORDS]
        step = max(1, len(long) // args.calibrate)
        parts = long[::step][: args.calibrate], held_out[: args.rows], held_out[-args.rows :]
        if len(held_out) < 2 * args.rows:
            raise ValueError(f"rows must be at most {len(held_out) // 2}, got {args.rows}")
        words = architecture.tokenizer or models.minilm()
        calibration, seen, unseen = (
            tokenized(part, words, args.length, args.batch) for part in parts
        )
        plugged(model, calibration, args)
        settings["placements"] = list(internals.placed(model))
        content = results.result("plans", settings, options.describe(architecture))
        content["rows"] = measure(model, seen, unseen, console)
    except (ValueError, OSError) as error:
        made.error(str(error))
    name = "_".join(("plans", architecture.name, *settings["placements"]))
    path = results.folder(args.output, args.publish) / f"{name}_{settings['plugins']}.json"
    table = tables.screen("Plans and uniform ratios", COLUMNS, content["rows"])
    return options.finish(content, path, console, table, draw=plot.draw)


if __name__ == "__main__":
    sys.exit(main())
