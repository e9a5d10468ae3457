"""Speed against the compression ratio k: the FFN sublayer and the whole encoder, on the CPU.

The encoder is measured with plugins at each set of placements, all in the same rounds.

Every arm is checked against float64 before and after it is timed; without a green check it has no
number, and the exit code is 1. Speed-ups are of the same round of the same process.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from functools import partial

from . import internals, plot
from .cases import Case, models
from .cases.encoder import Encoder
from .cases.sublayer import Sublayer
from .harness import allocator, options, results, tables
from .harness.clock import Wall
from .harness.runner import run

SMALL = ((1, 128), (1, 512))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("speed_vs_k", __doc__)
    made.add_argument("--scope", choices=("sublayer", "encoder", "both"), default="both")
    options.add_common(made)
    made.add_argument("--ratios", type=options.ratios, help="default: 2,4,8,16,32")
    made.add_argument(
        "--encoder-ratios", type=options.ratios, help="default: 4, or the first of --ratios"
    )
    made.add_argument("--arms", type=options.words, help=f"some of {', '.join(options.ARMS)}")
    made.add_argument(
        "--placements", type=options.words, action="append",
        help="of the encoder's plugins, with commas: ffn, attention_kv, attention; may be given "
        "several times, to be compared in one run; default ffn",
    )  # fmt: skip
    made.add_argument("--repeats", type=options.count, help="rounds of the sublayer; default 15")
    made.add_argument("--encoder-repeats", type=options.count, help="default 3")
    made.add_argument(
        "--budget",
        type=options.count,
        help="seconds to spend: as many rounds as fit, 2 rows unless asked, no compiled arms",
    )
    made.add_argument("--name", default="speed_vs_k", help="of the result's files")
    made.add_argument("--small", action="store_true", help="also 1x128 and 1x512")
    made.add_argument("--backward", action="store_true", help="also forward with backward")
    made.add_argument("--ragged", action="store_true", help="also a right-padded ragged batch")
    return made


def settle(args: argparse.Namespace) -> models.Architecture:
    """Fill in what was not asked for."""
    if args.budget:
        args.batch = args.batch or 2
    model = options.settle_common(args)
    sets = map(internals.placements, args.placements or [("ffn",)])
    args.placements = tuple(dict.fromkeys(sets))
    if args.scope != "sublayer":
        model = models.reaching(model, args.length)
    elif args.placements != (("ffn",),):
        raise ValueError("placements must be ffn in scope sublayer, got " + str(args.placements))
    args.ratios = args.ratios or ([4] if args.quick else [2, 4, 8, 16, 32])
    if args.encoder_ratios is None:
        args.encoder_ratios = [4] if 4 in args.ratios else args.ratios[:1]
    args.repeats = args.repeats or (3 if args.quick else 15)
    args.encoder_repeats = args.encoder_repeats or (2 if args.quick else 3)
    args.strict = args.arms is not None
    quick_arms = [arm for arm in options.ARMS if not arm.endswith("-compiled")]
    args.arms = options.check_arms(args.arms or (quick_arms if args.budget else options.ARMS))
    return model


def plan(args: argparse.Namespace, model: models.Architecture) -> Iterator[tuple[Case, int, int]]:
    """Cases in order, with rounds and warm-ups.

    Each is made when its turn comes, so that memory holds one at a time.
    """
    warmup = 1 if args.quick else 2
    shapes = [("sublayer", args.batch, args.length, args.repeats)]
    shapes += [("small", *shape, 3 * args.repeats) for shape in SMALL if args.small]
    extra = [name for name in ("ragged", "backward") if getattr(args, name)]
    shapes += [(name, args.batch, args.length, args.repeats) for name in extra]
    for dtype in args.dtype if args.scope != "encoder" else ():
        for name, batch, length, rounds in shapes:
            layer = Sublayer(model, dtype, batch, length, args.bottleneck)
            yield layer.case(args.arms, args.ratios, name), rounds, warmup
    for dtype in args.dtype if args.scope != "sublayer" else ():
        sizes = (args.batch, args.length, tuple(args.encoder_ratios), args.bottleneck)
        encoder = Encoder(model, dtype, *sizes, args.placements)
        yield encoder.case(args.arms), args.encoder_repeats, 0


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON and PNG; 1 if any arm failed."""
    made = parser()
    memory = allocator.keep_freed_memory()
    args = made.parse_args(arguments)
    with options.refusals(made):
        model = settle(args)
    settings = options.settings(args) | {"model": model.name, "allocator": memory}
    content, console = options.begin("speed_vs_k", settings, model)
    path = options.path_of(args, args.name)
    left = sum(1 for _ in args.dtype) * (2 if args.scope == "both" else 1)
    end = time.perf_counter() + (args.budget or math.inf)
    for case, rounds, warmup in plan(args, model):
        if not case.arms:
            continue
        now = time.perf_counter()
        if now > end:
            console.print(f"left out: {case.title} (the budget of {args.budget} s is spent)")
            continue
        until, left = now + (end - now) / max(left, 1), left - 1
        with tables.progress(console) as bar:
            one = partial(run, case, [Wall()], rounds, warmup=warmup, until=until)
            rows = one(strict=args.strict, progress=bar)
        content["rows"] += rows
        results.write(path, content)
        console.print(tables.timed(case.title, rows), "")
    if not content["rows"]:
        made.error("none of the arms asked for exists in this scope")
    bound = f"cost bound: dense over compressed multiply-adds. {tables.ABOVE}"
    return options.finish(content, path, console, bound, draw=plot.draw)


if __name__ == "__main__":
    sys.exit(main())
