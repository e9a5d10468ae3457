"""Time of a training step: of the small model alone, and projected, W_C built once a step.

Both arms make the same forward and backward passes and an AdamW step, in turns, in one process.
``counted`` is the part of building W_C that multiply-adds predict. Memory is that of a process that
trains one of them, at the peak of its second step, optimizer included: projected, it holds the
original besides.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch

import variator_kernels as vk

from .. import internals
from ..harness import allocations, child, machine, options, results, tables
from ..harness.clock import Wall, quartiles, ratio
from ..harness.results import Row
from . import __main__ as whole
from .data import Text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("projected.step", __doc__)
    add = made.add_argument
    add("--model", default="smollm2", help="smollm2 (default), tiny, or a folder of a decoder")
    add("--share", type=float, default=0.5, help="of the parameters; default 0.5")
    add("--tokens", type=options.count, default=16000, help="of a step; default 16000")
    add("--batch", type=options.count, default=4, help="rows of a forward; default 4")
    add("--length", type=options.count, default=512, help="tokens of a row; default 512")
    add("--repeats", type=options.count, default=5, help="steps of each arm; default 5")
    add("--steps", type=options.count, default=1500, help="of tiny from scratch; default 1500")
    add("--data", type=Path, default=machine.DATA, help="folder with wikitext2/")
    add("--cell", type=json.loads, help=argparse.SUPPRESS)
    return made


def stepping(
    model: Any, text: Text, batches: int, rows: int, projected: bool
) -> Callable[[], None]:
    """One step over ``batches`` batches of ``rows`` rows."""
    groups = internals.parameter_groups(model, 1e-5)
    optimizer = torch.optim.AdamW(groups)
    ids = [text.rows(rows, torch.Generator().manual_seed(i)) for i in range(batches)]
    model.train()

    def step() -> None:
        for some in ids:
            model(input_ids=some, labels=some, use_cache=False).loss.backward()
        if projected:
            internals.send(model)
        optimizer.step()
        optimizer.zero_grad()

    return step


def started(args: argparse.Namespace) -> tuple[Any, Text, int]:
    """The projected model, the text, and how many batches a step has."""
    model, text = whole.original(args)
    small: Any = vk.project(model, params=args.share, start="select", importance="weight")
    return small, text, max(1, round(args.tokens / (args.batch * text.length)))


def memory(cell: Row) -> Row:
    """By how much this process grows, from before the model to the peak of a step."""
    args = argparse.Namespace(**cell | {"data": Path(cell["data"])})
    options.set_threads(args)
    begin = psutil.Process().memory_info().rss
    model, text, batches = started(args)
    projected = cell["arm"] == "projected"
    if not projected:
        model = vk.merge(model)
        gc.collect()
    with internals.collecting(model) if projected else nullcontext():
        step = stepping(model, text, batches, args.batch, projected)
        step()
        held = allocations.resident() - begin
        growth = allocations.grown(step)
    return {"status": "ok", "peak_bytes": None if growth is None else held + growth}


def measure(args: argparse.Namespace) -> list[Row]:
    """A row for each arm."""
    small, text, batches = started(args)
    plain = vk.merge(small)
    tokens = batches * args.batch * text.length
    base = {"model": args.model, "share": args.share, "tokens": tokens}
    wrong = whole.agrees(small, plain, text.held_out(1))
    if wrong:
        return [{**base, "arm": "projected", "status": "failed", "reason": wrong}]
    steps = {
        "plain": stepping(plain, text, batches, args.batch, False),
        "projected": stepping(small, text, batches, args.batch, True),
    }
    with internals.collecting(small):
        for step in steps.values():
            step()
        times, _ = Wall().interleave(steps, args.repeats)
    cost = internals.counted(small, tokens)
    rows = []
    for name, found in times.items():
        row = {"arm": name, **quartiles(found), "seconds": found}
        row |= {"over_plain": ratio(found, times["plain"])["median"]}
        row |= {"counted": cost.share / (1 - cost.share) if name == "projected" else 0.0}
        row |= {"trained": cost.trainable if name == "projected" else cost.small}
        cell = vars(args) | {"arm": name, "data": str(args.data)}
        rows.append({**base, **row, **child.measured("projected.step", cell)})
    return rows


COLUMNS = [
    tables.key("arm", "arm"),
    tables.key("tokens", "tokens"),
    tables.number("seconds", lambda row: row["median"]),
    tables.number("over plain", lambda row: row["over_plain"], ".3f"),
    tables.number("counted", lambda row: 1 + row["counted"], ".3f"),
    tables.key("parameters", "trained"),
    tables.mib("peak, MiB", "peak_bytes", ".0f"),
]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if the check failed."""
    made = parser()
    args = made.parse_args(arguments)
    if args.cell:
        print(json.dumps(memory(args.cell)))
        return 0
    options.set_threads(args)
    settings = options.settings(args, "data", "model")
    name = options.named(args.model)
    content = results.result("projected_step", settings, {"name": name})
    with options.refusals(made):
        content["rows"] = measure(args)
    table = tables.screen(f"A training step of {name}", COLUMNS, content["rows"])
    path = options.path_of(args, f"projected_step_{name}")
    return options.finish(content, path, options.screen(), table)


if __name__ == "__main__":
    sys.exit(main())
