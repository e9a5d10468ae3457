"""What packed copies of weights cost: knowing that the weights are unchanged, and memory.

Looking: a whole encoder's forward under each rule. ``tracked``: the kernel reports writes;
``read``: all weights are read at every forward; ``frozen``: nobody looks. Before anything is timed,
each arm's output is judged by float64, and one neuron is written through ``.data``: all but
``frozen`` must see it, and see it taken back.

Memory: in fresh processes, what the process keeps after ``--lengths`` distinct lengths beyond what
it keeps after 30, and what a model that was patched, run and unpatched keeps beyond one that never
was patched.
"""

import argparse
import ctypes
import gc
import json
import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import psutil
import torch
from rich.progress import track
from torch import nn

import variator_kernels as vk

from . import internals
from .cases import Key, models
from .cases.encoder import Encoder
from .harness import child, options, results, tables
from .harness.checks import Outputs, Verdict, judge
from .harness.clock import Wall, quartiles, ratio
from .harness.results import Row

RULES = ("frozen", "tracked", "read")
SIZES = ((8, 512), (1, 128))
TARGETS = {(8, 512): 1.02, (1, 128): 1.05}
FEW, LONGEST, MEMORY_TARGET, UNPATCHED_TARGET = 30, 2048, 50, 1


@torch.no_grad()
def looking(args: argparse.Namespace, batch: int, length: int) -> list[Row]:
    """The rules beside each other on one size of input."""
    calls: dict[str, Callable[[], Any]] = {}
    found = []
    for rule in RULES:
        row: Row = {"case": "looking", "arm": rule, "batch": batch, "length": length, "k": args.k}
        found.append(row)
        case = Encoder(models.architecture(args.model), args.dtype[0], batch, length, (args.k,))
        model = case.patched(models.sharing(case.sdpa, "sdpa"), "cpu")
        call = partial(_last_hidden, model, case)
        with internals.not_tracked() if rule == "read" else nullcontext():
            if rule == "frozen":
                vk.freeze(model)
            verdict = judge(case.rows(call()), case.measure(Key("ours", args.k)))
        row.update(verdict.row())
        if not verdict.ok:
            continue
        if rule not in internals.rules(model):
            row.update(status="skipped", reason=f"not {rule} here")
        elif rule != "frozen" and not _sees_a_write(model, call):
            row.update(status="failed", reason="a write was missed")
        else:
            calls[rule] = call
    samples, _ = Wall().interleave(calls, args.rounds)
    for row in found:
        if row["arm"] in calls:
            own = samples[row["arm"]]
            row.update(samples=own, **quartiles(own), over=ratio(own, samples["frozen"]))
    return found


def _last_hidden(model: nn.Module, case: Encoder) -> Outputs:
    ((ids, mask),) = case.inputs
    return (model(input_ids=ids, attention_mask=mask).last_hidden_state,)


def _sees_a_write(model: nn.Module, call: Callable[[], Any]) -> bool:
    before = call()[0]
    weight = internals.describe(internals.ffn_sublayers(model)[0]).w_in
    neuron = weight.data[37].clone()
    weight.data[37] = 3.0
    changed = call()[0]
    weight.data[37] = neuron
    return not torch.equal(before, changed) and torch.equal(before, call()[0])


def kept() -> int:
    """Bytes of this process, without what the C library only holds ready."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


@torch.no_grad()
def lengths(cell: Row) -> Row:
    """The first FFN sublayer as an op, over distinct lengths in random order."""
    kind = models.DTYPES[cell["dtype"]]
    config = models.architecture(cell["model"]).config
    _, ffn = models.sublayer(models.architecture(cell["model"]), kind)
    plugin = models.plugin(config, cell["k"], 64, kind)
    order = random.Random(0).sample(range(1, LONGEST * cell["k"] + 1), cell["lengths"])
    x = models.hidden(1, LONGEST * cell["k"], config.hidden_size, kind)
    backends = ("cpu", "reference")
    error = max(
        _difference(
            *(vk.functional.compressed_ffn(x[:, :n], plugin, ffn, backend=b) for b in backends)
        )
        for n in (*order[:FEW], LONGEST * cell["k"])
    )
    few = kept()
    for n in order[FEW:]:
        vk.functional.compressed_ffn(x[:, :n], plugin, ffn, backend="cpu")
    return {"bytes": kept() - few, **_judged(error, kind)}


@torch.no_grad()
def unpatched(cell: Row) -> Row:
    """A model that was patched, run and unpatched, the second in its process: what kernels and
    libraries load once is no model's."""
    kind = models.DTYPES[cell["dtype"]]
    model = models.encoder(models.architecture(cell["model"]), kind)
    ids = models.tokens(2, 128, model.config.vocab_size)
    dense = model(input_ids=ids).last_hidden_state
    for _ in range(2):
        before = kept()
        vk.patch(model, cell["k"], (cell["k"],))
        model(input_ids=ids)
        packed = internals.packed_bytes(model)
        vk.unpatch(model)
    error = _difference(model(input_ids=ids).last_hidden_state, dense)
    return {"bytes": kept() - before, "packed": packed, **_judged(error, kind)}


def _difference(out: torch.Tensor, other: torch.Tensor) -> float:
    return ((out.double() - other.double()).norm() / other.double().norm()).item()


def _judged(error: float, kind: torch.dtype) -> Row:
    allowed = 4 * torch.finfo(kind).eps
    return Verdict(error <= allowed, error, allowed).row()


CELLS = {"lengths": lengths, "unpatched": unpatched}


in_child = partial(child.measured, "packing")


LOOKING = [
    tables.Column("batch x length", lambda row: f"{row['batch']} x {row['length']}", True),
    tables.key("rule", "arm"),
    tables.Column("ms", tables.milliseconds),
    tables.Column("over frozen", lambda row: tables.times(row.get("over"))),
]
MEMORY = [
    tables.key("case", "case"),
    tables.key("dtype", "dtype"),
    tables.mib("kept, MiB", "bytes"),
]


def _looking_note(row: Row) -> str:
    target = TARGETS.get((row["batch"], row["length"]))
    if row["arm"] != "tracked" or target is None:
        return ""
    return f"{'met' if row['over']['median'] <= target else 'missed'}: at most {target:.2f}"


def _memory_note(row: Row) -> str:
    target = MEMORY_TARGET if row["case"] == "lengths" else UNPATCHED_TARGET
    return f"{'met' if row['bytes'] <= target * 2**20 else 'missed'}: at most {target} MiB"


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if a cell failed."""
    made = options.parser("packing", __doc__)
    options.add_common(made)
    made.add_argument("--k", type=options.count, default=4, help="the ratio; default 4")
    made.add_argument("--rounds", type=options.count, default=9, help="default 9")
    made.add_argument("--lengths", type=options.count, default=3000, help="default 3000")
    made.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    args = made.parse_args(arguments)
    if args.cell:
        torch.set_num_threads(args.cell["threads"])
        print(json.dumps(CELLS[args.cell["case"]](args.cell)))
        return 0
    with options.refusals(made):
        model = options.settle_common(args)
    settings = options.chosen(args, "k", "threads", "lengths")
    content, console = options.begin("packing", settings, model)
    for size in track(SIZES, "looking", console=console):
        content["rows"] += looking(args, *size)
    cells = [
        {"case": case, "dtype": dtype, "model": args.model, **settings}
        for case in CELLS
        for dtype in args.dtype
    ]
    for cell in track(cells, "memory", console=console):
        content["rows"].append({**cell, **in_child(cell)})
    rows = content["rows"]
    first = tables.screen("looking for writes", LOOKING, results.pick(rows, case="looking"),
                          note=_looking_note)  # fmt: skip
    memory = [row for row in rows if row["case"] in CELLS]
    second = tables.screen("memory that stays", MEMORY, memory, note=_memory_note)
    return options.finish(content, options.path_of(args, "packing"), console, first, second)


if __name__ == "__main__":
    sys.exit(main())
