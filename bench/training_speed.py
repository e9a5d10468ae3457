"""Training speed: a step of plugin training through the kernels, against the eager reference.

A step is what ``DistillationTrainer`` does: the teacher's forward, the student's forward and
backward, and Adam, in fp32 or in mixed precision (bf16). The arms of a dtype share one process and
take turns, each with one untimed step before the timed one. Loss and gradients of each arm are
compared with float64 before and after; without a green check an arm has no number, and the exit
code is 1.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import tempfile
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import variator_kernels as vk
from variator_kernels.ops import prepack
from variator_kernels.train import DistillationConfig, DistillationTrainer, losses

from .common import allocations, checks, models, options, results, timing
from .common.results import Row
from .memory import MIB

ARMS = {"reference": "reference", "ours": "auto", "ours-unpacked": "auto"}
"""Backends. The last leaves the frozen weights' products to PyTorch, which takes less memory."""
DTYPES = ("fp32", "bf16")
SHAPES = ((4, 128), (16, 24))
"""Rows and tokens of a batch: paragraphs as in pre-training, sentences as in adaptation."""


class Arm:
    """One patched copy of the model, its optimizer, and the batch."""

    def __init__(
        self,
        model: Any,
        name: str,
        args: argparse.Namespace,
        shape: tuple[int, int],
        dtype: str,
        folder: str,
    ) -> None:
        self.model = vk.patch(
            copy.deepcopy(model), args.ratio, (args.ratio,), args.bottleneck, backend=ARMS[name]
        )
        generator = models.generator(1)
        with torch.no_grad():
            for parameter in vk.plugin_parameters(self.model):
                parameter.normal_(0, 0.02, generator=generator)
        config = DistillationConfig(
            output_dir=folder,
            use_cpu=True,
            max_steps=1,
            report_to="none",
            bf16=dtype == "bf16",
            packed_products=name != "ours-unpacked",
        )
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
    packed = {name: prepack.cache.nbytes(arm.model.parameters()) for name, arm in arms.items()}
    peaks = {name: allocations.profiled(arm.gradients).peak for name, arm in arms.items()}
    for arm in arms.values():
        for group in arm.optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        arm.step()
    steps = {name: arm.step for name, arm in arms.items()}
    # A run takes the same step again and again: each arm finds the caches as it left them.
    seconds, _ = timing.interleave(steps, rounds, settle=True)
    rows = []
    for name, arm in arms.items():
        worst = max(
            (verdicts[name], checks.judge(arm.gradients(), truth)),
            key=lambda verdict: (not verdict.ok, verdict.error / max(verdict.allowed, 1e-30)),
        )
        row: Row = {"case": "training", "batch": shape[0], "length": shape[1]}
        row |= {"dtype": dtype, "arm": name}
        row |= {"error": worst.error, "allowed": worst.allowed}
        if worst.ok:
            row |= {
                "status": "ok",
                "samples": seconds[name],
                "seconds": timing.quartiles(seconds[name]),
                "over_reference": timing.ratio(seconds[name], seconds["reference"]),
                "peak_bytes": peaks[name],
                "packed_bytes": packed[name],
                "memory_over_reference": (peaks[name] + packed[name]) / peaks["reference"],
            }
        else:
            row |= {"status": "failed", "reason": f"error {worst.error:.3g} > {worst.allowed:.3g}"}
        rows.append(row)
    return rows


def table(rows: list[Row]) -> Table:
    """Step time and memory, beside the reference's."""
    made = Table(title="a training step", title_justify="left")
    sizes = ("peak, MiB", "packed weights, MiB", "both over reference")
    for name in ("rows x tokens", "dtype", "arm", "seconds", "over reference", *sizes, "check"):
        made.add_column(name, justify="left" if name in ("dtype", "arm") else "right")
    for row in rows:
        check = f"{row['error']:.1e} / {row['allowed']:.1e}"
        names = f"{row['batch']} x {row['length']}", row["dtype"], row["arm"]
        if row["status"] != "ok":
            made.add_row(*names, "FAILED", "", "", "", "", check)
            continue
        made.add_row(
            *names,
            f"{row['seconds']['median']:.3f}",
            f"{row['over_reference']['median']:.2f}",
            f"{row['peak_bytes'] / MIB:.0f}",
            f"{row['packed_bytes'] / MIB:.0f}",
            f"{row['memory_over_reference']:.2f}",
            check,
        )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if an arm failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.training_speed", description=__doc__)
    options.add_common(parser)
    parser.add_argument("--ratio", type=options.count, default=4, help="k; default 4")
    parser.add_argument("--attention", default="eager", choices=("eager", "sdpa"))
    parser.add_argument("--repeats", type=options.count, help="rounds; default 9")
    parser.add_argument("--quick", action="store_true", help="little work: does everything run?")
    args = parser.parse_args(arguments)
    one = args.quick or args.batch or args.length
    if not args.quick:
        args.batch, args.length = args.batch or SHAPES[0][0], args.length or SHAPES[0][1]
    try:
        options.settle_common(args)
        wrong = [dtype for dtype in args.dtype if dtype not in DTYPES]
        if wrong:
            raise ValueError(f"dtype must be of {', '.join(DTYPES)}, got {wrong[0]!r}")
        model = models.architecture(args.model)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    shapes = ((args.batch, args.length),) if one else SHAPES
    names = ("bottleneck", "ratio", "threads", "dtype", "attention")
    settings = {"shapes": shapes} | {name: getattr(args, name) for name in names}
    content = results.result("training_speed", settings, options.describe(model))
    console = Console(width=None if sys.stdout.isatty() else 150)
    options.print_head(console, content)
    built = models.encoder(model, torch.float32, args.attention)
    with tempfile.TemporaryDirectory() as folder:
        content["rows"] = [
            row
            for shape, dtype in itertools.product(shapes, args.dtype)
            for row in measure(built, args, shape, dtype, folder)
        ]
    path = results.folder(args.output, args.publish) / "training_speed.json"
    results.write(path, content)
    console.print(table(content["rows"]), f"written: {options.shown(path)}")
    return int(any(row["status"] == "failed" for row in content["rows"]))


if __name__ == "__main__":
    sys.exit(main())
