"""Dtypes: the FFN sublayer in bf16, fp16, int8 and under autocast, against the same work in fp32.

Inference, inference with gradients enabled, and a training step of the plugin (FFN frozen), on the
CPU; int8 (beside bf16 where the processor has its products) in inference alone. Every arm is
checked before and after it is timed against float64: by the error of the plain reference in the
same dtype, in int8 by a bound on the relative error. Ratios are of the same round. One rule decides
in what dtype a product runs: where the processor has none in 16 bits, fp32, and then an arm should
take at most 1.15 times as long.
"""

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cases import Arm, Call, Case, Key, models
from .cases.sublayer import Plugged, Sublayer
from .harness import allocator, machine, options, results, tables
from .harness.checks import QUANTISED, Outputs, Truth, truth
from .harness.clock import Wall, ratio
from .harness.runner import run

RATIO, LIMIT = 4, 1.15
ARMS = (*models.DTYPES, "autocast")
INFERENCE = (*ARMS, "int8")
CASES = ("inference", "gradients enabled", "training step")


class Work:
    """One sublayer in every dtype."""

    def __init__(self, model: models.Architecture, batch: int, length: int) -> None:
        self.size = batch, length
        self.model = model

    def parts(self, arm: str, wide: bool = False) -> tuple[Plugged, Tensor, Plugged]:
        """Our module, its input, and the reference's with the same weights."""
        beside = "bf16" if arm == "int8" and machine.has_bf16() else "fp32"
        layer = Sublayer(self.model, arm if arm in models.DTYPES else beside, *self.size)
        ffn, plugin, x = layer.ffn, layer.plugin(RATIO), layer.x
        if wide:
            ffn, plugin = models.moved(ffn, torch.float64), models.moved(plugin, torch.float64)
            x = x.double()
        own = ffn._replace(precision="int8") if arm == "int8" else ffn
        return Plugged(own, plugin, "auto", True), x, Plugged(ffn, plugin, "reference", True)

    def call(self, case: str, arm: str, module: Plugged, x: Tensor) -> Outputs:
        """What is timed: the output, and in training the gradients of input and plugin."""
        trained = [p for p in module.parameters() if p.requires_grad]
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=arm == "autocast"),
            torch.set_grad_enabled(case != "inference"),
        ):
            x = x.detach().requires_grad_(case == "training step")
            y = module(x)
        if case != "training step":
            return (y.detach(),)
        gradients = torch.autograd.grad(y, (x, *trained), x.detach().to(y.dtype))
        return (y.detach(), *gradients)

    def truth(self, case: str, key: Key) -> Truth:
        """Float64 of the arm's own weights, and the reference's error in the arm's dtype."""
        _, x, reference = self.parts(key.arm, wide=True)
        exact = self.call(case, "", reference, x)
        if key.arm == "int8":
            return Truth(exact, (), QUANTISED)
        _, x, plain = self.parts(key.arm)
        return truth(exact, self.call(case, key.arm, plain, x))

    def build(self, case: str, arm: str) -> Call:
        module, x, _ = self.parts(arm)
        return partial(self.call, case, arm, module, x)

    def case(self, name: str) -> Case:
        """An arm a dtype."""
        batch, length = self.size
        direction = "forward" if name == "inference" else "backward"
        made = Case(name, "sublayer", direction, self.model.name, "", batch, length,
                    partial(self.truth, name))  # fmt: skip
        # The padding tells truths of a case apart: here every dtype has its own.
        arms = INFERENCE if name == "inference" else ARMS
        keys = [Key(arm, RATIO, arm) for arm in arms]
        made.arms = [Arm(key, partial(self.build, name, key.arm), batch * length) for key in keys]
        return made


def over(rows: list[results.Row]) -> None:
    """Each row's time over fp32's and bf16's, by round."""
    for dtype in ("fp32", "bf16"):
        if base := results.one(rows, arm=dtype):
            for row in results.pick(rows, status="ok"):
                row[f"over_{dtype}"] = ratio(row["samples"], base["samples"])


COLUMNS = [
    tables.key("case", "case"),
    tables.key("dtype", "arm"),
    tables.number("ms", lambda row: row["median"] * 1e3, ".1f"),
    tables.number("over fp32", lambda row: row["over_fp32"]["median"], ".2f"),
    tables.number("q1", lambda row: row["over_fp32"]["q1"], ".2f"),
    tables.number("q3", lambda row: row["over_fp32"]["q3"], ".2f"),
    tables.number("over bf16", lambda row: row.get("over_bf16", {}).get("median"), ".2f"),
]


def _note(row: dict[str, Any]) -> str:
    return "" if row["over_fp32"]["median"] <= LIMIT else f"above {LIMIT:g}"


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if any arm failed."""
    made = options.parser("dtypes", __doc__)
    options.add_common(made)
    made.add_argument("--rounds", type=options.count, default=15, help="default 15")
    memory = allocator.keep_freed_memory()
    args = made.parse_args(arguments)
    args.batch, args.length = args.batch or 4, args.length or (32 if args.quick else 256)
    with options.refusals(made):
        model = options.settle_common(args)
    settings = options.chosen(args, "batch", "length", "rounds", "threads")
    content, console = options.begin("dtypes", settings | {"allocator": memory}, model)
    work = Work(model, args.batch, args.length)
    for name in CASES:
        rows = run(work.case(name), [Wall()], args.rounds, warmup=2)
        over(rows)
        content["rows"] += rows
    title = f"{model.name} sublayer, k={RATIO}, {args.batch} x {args.length}"
    table = tables.screen(title, COLUMNS, content["rows"], note=_note)
    return options.finish(content, options.path_of(args, "dtypes"), console, table)


if __name__ == "__main__":
    sys.exit(main())
