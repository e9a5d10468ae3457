"""Whole encoders on the CPU: ours beside the runtimes that users would otherwise pick.

Hugging Face (eager, SDPA, compiled), OpenVINO, ONNX Runtime, CTranslate2, torchao and ours, in
every dtype they have here, take turns in one process on as many threads each. Every arm is checked
before and after it is timed against float64 of the fp32 original: in fp32 and bf16 by the error of
plain PyTorch, in int8 by a bound on the relative error; ours against the reference at the same
level. What is not installed, cannot export the model or fails its check has no number and is listed
with the reason. What runtimes export is kept in a folder (--work): a second run is quick.
"""

import argparse
import logging
import os
import sys
from functools import partial
from pathlib import Path
from unittest import mock

from .. import internals, plot
from ..cases import models
from ..harness import allocator, machine, options, results, tables
from ..harness.clock import Wall
from ..harness.results import Row
from ..harness.runner import run
from . import inputs, table
from .case import ARMS, DTYPES, Peers

SHAPES = ("1x32", "1x128", "1x512", "8x512", inputs.SST2)
PLACEMENTS = (("ffn",), ("ffn", "attention_kv"))
SLOW_ARMS = ("ours-compiled",)
"""Only where they are asked for."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("peers", __doc__)
    add = made.add_argument
    built_in = ", ".join(models.NAMES)
    add("--model", default="t5-base", help=f"{built_in}, or a folder with config.json")
    add("--shape", nargs="+", default=list(SHAPES), metavar="ROWSxTOKENS",
        help=f"inputs, or {inputs.SST2} for sentences; default {' '.join(SHAPES)}")  # fmt: skip
    add("--ratio", type=_ratios, default=(4,),
        help="k of ours, several with commas; 1: dense; default 4")  # fmt: skip
    add("--placements", type=options.words, action="append",
        help="of our plugins, with commas; may be given several times; default ffn, and ffn with "
        "attention_kv")  # fmt: skip
    add("--bottleneck", type=options.count, default=64, help="r; default 64")
    add("--dtype", type=options.words,
        help=f"some of {', '.join(DTYPES)}; default all, bf16 if the processor has it")  # fmt: skip
    add("--arms", type=options.words,
        help=f"some of {', '.join(ARMS)}; default all but {', '.join(SLOW_ARMS)}")  # fmt: skip
    add("--rounds", type=options.count, default=7, help="default 7")
    add("--sentences", type=options.count, default=256, help="of SST-2; default 256")
    add("--data", type=Path, default=machine.DATA, help="folder with sst2/")
    add("--work", type=Path, default=machine.ROOT / "build" / "peers", help="default build/peers")
    add("--name", help="of the result's files; default peers_<model>")
    return made


def _ratios(text: str) -> tuple[int, ...]:
    values = tuple(dict.fromkeys(map(options.count, options.words(text))))
    if not values:
        raise argparse.ArgumentTypeError("ratios must be integers of at least 1")
    return values


def settle(args: argparse.Namespace) -> tuple[models.Architecture, list[inputs.Input]]:
    """Fill in what was not asked for; ``ValueError`` for what there is not."""
    for name, known in (("arms", ARMS), ("dtype", DTYPES)):
        options.check(name, getattr(args, name) or (), known)
    args.strict = args.arms is not None
    args.arms = args.arms or [name for name in ARMS if name not in SLOW_ARMS]
    args.dtype = args.dtype or [d for d in DTYPES if d != "bf16" or machine.has_bf16()]
    args.placements = list(map(internals.placements, args.placements or PLACEMENTS))
    options.set_threads(args)
    model = models.architecture(args.model)
    shapes = [inputs.parse(shape) for shape in dict.fromkeys(args.shape)]
    found = [inputs.made(shape, model, args.data, args.sentences) for shape in shapes]
    return models.reaching(model, max(given.length for given in found)), found


def measured(model: models.Architecture, given: inputs.Input, args: argparse.Namespace,
             console: options.Console) -> list[Row]:  # fmt: skip
    """The rows of one input. Memory holds the arms of one at a time."""
    peers = Peers(
        model, given, args.ratio, tuple(args.placements), args.bottleneck, args.dtype,
        partial(inputs.calibration, model, args.data), args.work,
    )  # fmt: skip
    case = peers.case(args.arms)
    with tables.progress(console) as bar:
        rows = run(case, [Wall()], args.rounds, warmup=1, strict=args.strict, progress=bar)
    table.mark(rows, given.name)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON and PNG; 1 if an arm failed."""
    made = parser()
    memory = allocator.keep_freed_memory()
    args = made.parse_args(arguments)
    with options.refusals(made):
        model, found = settle(args)
    logging.getLogger("nncf").setLevel(logging.ERROR)
    options.quiet()
    settings = options.settings(args, "data", "work", "model")
    content, console = options.begin("peers", settings | {"allocator": memory}, model)
    path = options.path_of(args, args.name or f"peers_{model.name}")
    for given in found:
        with mock.patch.dict(os.environ, CI="true"):  # keeps OpenVINO from starting telemetry
            rows = measured(model, given, args, console)
        content["rows"] += rows
        results.write(path, content)
        console.print(tables.screen(f"{model.name}, {given.name}", table.SCREEN, rows), "")
    missing = sum(row["status"] != "ok" for row in content["rows"])
    said = f"[yellow]{missing} without a number: the reasons stand beside them[/yellow]"
    return options.finish(content, path, console, said if missing else "", draw=plot.draw)


if __name__ == "__main__":
    sys.exit(main())
