"""Speed against the compression ratio k: the FFN sublayer and the whole encoder, on the CPU.

Every arm is checked against float64 before and after it is timed; without a green check it has no
number, and the exit code is 1. Speed-ups are of the same round of the same process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.console import Console

from . import plot
from .common import allocator, cells, encoder, models, options, results, sublayer, tables

SMALL = ((1, 128), (1, 512))


class Planned(NamedTuple):
    """A case and how often its arms run."""

    case: cells.Case
    rounds: int
    warmup: int


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m bench.speed_vs_k", description=__doc__)
    made.add_argument("--scope", choices=("sublayer", "encoder", "both"), default="both")
    options.add_common(made)
    made.add_argument("--ratios", type=options.ratios, help="default: 2,4,8,16,32")
    made.add_argument(
        "--encoder-ratios", type=options.ratios, help="default: 4, or the first of --ratios"
    )
    made.add_argument("--arms", type=options.words, help=f"some of {', '.join(options.ARMS)}")
    made.add_argument("--repeats", type=options.count, help="rounds of the sublayer; default 15")
    made.add_argument("--encoder-repeats", type=options.count, help="default 3")
    made.add_argument("--small", action="store_true", help="also 1x128 and 1x512")
    made.add_argument("--backward", action="store_true", help="also forward with backward")
    made.add_argument("--ragged", action="store_true", help="also a right-padded ragged batch")
    made.add_argument("--quick", action="store_true", help="little work: does everything run?")
    return made


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what was not asked for."""
    options.settle_common(args)
    args.ratios = args.ratios or ([4] if args.quick else [2, 4, 8, 16, 32])
    if args.encoder_ratios is None:
        args.encoder_ratios = [4] if 4 in args.ratios else args.ratios[:1]
    args.repeats = args.repeats or (3 if args.quick else 15)
    args.encoder_repeats = args.encoder_repeats or (2 if args.quick else 3)
    args.strict = args.arms is not None
    args.arms = options.check_arms(args.arms or options.ARMS)
    return args


def plan(args: argparse.Namespace, model: models.Architecture) -> Iterator[Planned]:
    """The cases in order; each is made when its turn comes, so that memory holds one at a time."""
    size, arms, ratios = (args.batch, args.length), args.arms, args.ratios
    warmup = 1 if args.quick else 2

    def made(dtype: str, batch: int, length: int) -> sublayer.Sublayer:
        return sublayer.Sublayer(model, dtype, batch, length, args.bottleneck)

    for dtype in args.dtype if args.scope != "encoder" else ():
        yield Planned(made(dtype, *size).forward(arms, ratios), args.repeats, warmup)
        for shape in SMALL if args.small else ():
            small = made(dtype, *shape).forward(arms, ratios, "small")
            yield Planned(small, 3 * args.repeats, warmup)
        if args.ragged:
            yield Planned(made(dtype, *size).ragged(arms, ratios), args.repeats, warmup)
        if args.backward:
            yield Planned(made(dtype, *size).backward(arms, ratios), args.repeats, warmup)
    for dtype in args.dtype if args.scope != "sublayer" else ():
        whole = encoder.Encoder(model, dtype, *size, tuple(args.encoder_ratios), args.bottleneck)
        yield Planned(whole.forward(arms), args.encoder_repeats, 0)


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON and PNG; 1 if any arm failed."""
    made = parser()
    memory = allocator.keep_freed_memory()
    try:
        args = settle(made.parse_args(arguments))
        model = models.architecture(args.model)
    except ValueError as error:
        made.error(str(error))
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 150)
    hidden = ("output", "publish")
    settings = {name: value for name, value in vars(args).items() if name not in hidden}
    settings["model"], settings["allocator"] = model.name, memory
    content = results.result("speed_vs_k", settings, options.describe(model))
    options.print_head(console, content)
    path = results.folder(args.output, args.publish) / "speed_vs_k.json"
    for case, rounds, warmup in plan(args, model):
        if not case.arms:
            continue
        with tables.progress(console) as bar:
            rows = cells.run(case, rounds, warmup, args.strict, bar)
        content["rows"] += rows
        results.write(path, content)
        console.print(tables.table(case.title, rows), "")
    failed = results.pick(content["rows"], status="failed")
    if not content["rows"]:
        made.error("none of the arms asked for exists in this scope")
    console.print(f"cost bound: dense over compressed multiply-adds. {tables.ABOVE}")
    console.print(f"written: {options.shown(path)}, {options.shown(plot.draw(content, path))}")
    if failed:
        console.print(f"[red]{len(failed)} arms failed: their numbers are withheld[/red]")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
