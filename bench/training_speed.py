"""Training speed: a step of plugin training through the kernels, against the eager reference.

A step is what ``DistillationTrainer`` does: the teacher's forward, the student's forward and
backward, and Adam, in fp32 or in mixed precision (bf16). The arms of a dtype share one process and
take turns, each with one untimed step before the timed one. Loss and gradients of each arm are
compared with float64 before and after; without a green check an arm has no number, and the exit
code is 1.
"""

import argparse
import copy
import itertools
import sys
import tempfile
from typing import Any

import torch

import variator_kernels as vk
from variator_kernels.train import DistillationConfig, DistillationTrainer, losses

from . import internals
from .cases import models
from .harness import allocations, checks, options, tables
from .harness.clock import Wall, quartiles, ratio
from .harness.results import Row

ARMS = {"reference": "reference", "ours": "auto", "ours-unpacked": "auto"}
"""Backends. The last leaves the frozen weights' products to PyTorch, which takes less memory."""
NAMES = {
    "reference": "plain PyTorch, eager",
    "ours": "kernels",
    "ours-unpacked": "kernels, `--packed_products False`",
}
DTYPES = ("fp32", "bf16")
SHAPES = ((4, 128), (16, 24))
"""Rows and tokens of a batch: paragraphs as in pre-training, sentences as in adaptation."""


class Arm:
    """One patched copy of the model, its optimizer, and the batch."""

    def __init__(
        self, model: Any, name: str, args: argparse.Namespace, shape: tuple[int, int], dtype: str,
        folder: str,
    ) -> None:  # fmt: skip
        self.model = vk.patch(
            copy.deepcopy(model), args.ratio, (args.ratio,), args.bottleneck, backend=ARMS[name]
        )
        models.fill(self.model)
        config = DistillationConfig(
            output_dir=folder, use_cpu=True, max_steps=1, report_to="none", bf16=dtype == "bf16",
            packed_products=name != "ours-unpacked",
        )  # fmt: skip
        self.trainer = DistillationTrainer(self.model, config)
        self.model = self.trainer.accelerator.prepare_model(self.model)  # mixed precision
        self.optimizer = self.trainer.create_optimizer()
        high = self.model.config.vocab_size
        ids = torch.randint(5, high, shape, generator=models.generator(2))
        self.batch = {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.long)}
        self.total = losses.counts(self.batch)

    def gradients(self) -> checks.Outputs:
        """Loss and gradients of every plugin parameter."""
        self.optimizer.zero_grad()
        loss = self.trainer.training_step(self.model, dict(self.batch), self.total)
        gradients: Any = (p.grad for p in vk.plugin_parameters(self.model))
        return loss, *gradients

    def step(self) -> checks.Outputs:
        """A whole step; plugins stay where they are, so that every round does the same."""
        loss, *_ = self.gradients()
        self.optimizer.step()
        return (loss,)

    def double(self) -> checks.Outputs:
        """Loss and gradients in float64."""
        before = copy.deepcopy(self.model.state_dict())
        self.model.double()
        found = tuple(tensor.clone() for tensor in self.gradients())
        self.model.float()
        self.model.load_state_dict(before)
        self.optimizer.zero_grad()
        return found


def measure(
    model: Any, args: argparse.Namespace, shape: tuple[int, int], dtype: str, folder: str
) -> list[Row]:
    """Check, time in turns, check again; memory by arm."""
    arms = {name: Arm(model, name, args, shape, dtype, folder) for name in ARMS}
    rounds = args.repeats or (3 if args.quick else 9)
    truth = checks.truth(arms["reference"].double(), arms["reference"].gradients())
    verdicts = {name: checks.judge(arm.gradients(), truth) for name, arm in arms.items()}
    packed = {name: internals.packed_bytes(arm.model) for name, arm in arms.items()}
    peaks = {name: allocations.profiled(arm.gradients).peak for name, arm in arms.items()}
    for arm in arms.values():
        for group in arm.optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        arm.step()
    steps = {name: arm.step for name, arm in arms.items()}
    # A run takes the same step again and again: each arm finds the caches as it left them.
    seconds, _ = Wall().interleave(steps, rounds, settle=True)
    rows = []
    for name, arm in arms.items():
        worst = max(
            (verdicts[name], checks.judge(arm.gradients(), truth)),
            key=lambda verdict: (not verdict.ok, verdict.error / max(verdict.allowed, 1e-30)),
        )
        row: Row = {"case": "training", "batch": shape[0], "length": shape[1]}
        row |= {"dtype": dtype, "arm": name, **worst.row()}
        if worst.ok:
            taken, peak = seconds[name], peaks[name]
            row |= {"samples": taken, "seconds": quartiles(taken)}
            row |= {"over_reference": ratio(taken, seconds["reference"])}
            row |= {"peak_bytes": peak, "packed_bytes": packed[name]}
            row["memory_over_reference"] = (peak + packed[name]) / peaks["reference"]
        rows.append(row)
    return rows


COLUMNS = [
    tables.Column("rows x tokens", lambda row: f"{row['batch']} x {row['length']}", True),
    tables.key("dtype", "dtype"),
    tables.Column("a step, k=4", lambda row: NAMES[row["arm"]], True),
    tables.number("seconds", lambda row: row["seconds"]["median"], ".3f"),
    tables.number("of plain PyTorch", lambda row: row["over_reference"]["median"]),
    tables.mib("peak memory, MiB", "peak_bytes", ".0f"),
    tables.mib("packed weights, MiB", "packed_bytes", ".0f"),
    tables.number("both, of plain PyTorch", lambda row: row["memory_over_reference"]),
]
"""Of the tables on the screen and in the documentation."""


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if an arm failed."""
    made = options.parser("training_speed", __doc__)
    options.add_common(made)
    made.add_argument("--ratio", type=options.count, default=4, help="k; default 4")
    made.add_argument("--attention", default="eager", choices=("eager", "sdpa"))
    made.add_argument("--repeats", type=options.count, help="rounds; default 9")
    args = made.parse_args(arguments)
    one = args.quick or args.batch or args.length
    if not args.quick:
        args.batch, args.length = args.batch or SHAPES[0][0], args.length or SHAPES[0][1]
    with options.refusals(made):
        model = options.settle_common(args)
        options.check("dtype", args.dtype, DTYPES)
    shapes = ((args.batch, args.length),) if one else SHAPES
    names = ("bottleneck", "ratio", "threads", "dtype", "attention")
    settings = {"shapes": shapes} | options.chosen(args, *names)
    content, console = options.begin("training_speed", settings, model)
    built = models.encoder(model, torch.float32, args.attention)
    with tempfile.TemporaryDirectory() as folder:
        for shape, dtype in itertools.product(shapes, args.dtype):
            content["rows"] += measure(built, args, shape, dtype, folder)
    table = tables.screen("a training step", [*COLUMNS, tables.CHECK], content["rows"])
    return options.finish(content, options.path_of(args, "training_speed"), console, table)


if __name__ == "__main__":
    sys.exit(main())
