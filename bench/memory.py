"""Peak memory of the FFN sublayer: a forward, and a forward with backward, by arm.

Each cell runs in a fresh process. ``temporary`` is what torch allocates at most beside the outputs;
``process`` is by how much the process grew, outputs and the kernels' own memory included. A cell
whose outputs are not right has no number, and the exit code is 1.
"""

import argparse
import json
import sys
from functools import partial

import torch
from rich.progress import track

from .cases import Key, models
from .cases.sublayer import Sublayer
from .harness import allocations, child, options, results, tables
from .harness.checks import factor_of, judge
from .harness.compiling import Unavailable
from .harness.results import Row

DENSE, PLUGGED = ("hf", "dense-packed"), ("reference", "ours")
DIRECTIONS = ("forward", "backward")


def measure(cell: Row) -> Row:
    """One cell, in this process: a small warm-up, the process's growth, the allocations."""
    torch.set_num_threads(cell["threads"])
    model = models.architecture(cell["model"])
    key, backward = Key(cell["arm"], cell["k"]), cell["direction"] == "backward"
    sizes = (cell["batch"], cell["length"], cell["bottleneck"])
    layer = Sublayer(model, cell["dtype"], *sizes)
    full = layer.x
    with torch.set_grad_enabled(backward):
        try:
            call = layer.build(key, backward)
            layer.x = full[:1, :64]
            call()  # packs weights, starts threads
            layer.x = full
            growth = allocations.grown(call)
            taken = allocations.profiled(call)
            verdict = judge(call(), layer.measure(key, backward), factor_of(key.arm))
        except Unavailable as error:
            return {"status": "skipped", "reason": str(error)}
    found = verdict.row()
    if not verdict.ok:
        return found
    found |= {f"{name}_bytes": getattr(taken, name) for name in ("peak", "temporary", "largest")}
    width = min(2 * layer.d, layer.f) * full.element_size()
    found |= {"output_bytes": taken.outputs, "process_bytes": growth}
    return found | {"forbidden_bytes": cell["batch"] * cell["length"] * width}


in_child = partial(child.measured, "memory")


def columns(rows: list[Row]) -> list[tables.Column]:
    """Of the tables on the screen and in the documentation."""

    def arm(row: Row) -> str:
        return f"{row['arm']}, k={row['k']}" if row["k"] else row["arm"]

    def share(row: Row) -> str:
        part = share_of_dense(rows, row)
        return f"{part:.0%}" if part else ""

    return [
        tables.key("direction", "direction"),
        tables.key("dtype", "dtype"),
        tables.Column("arm", arm, True),
        tables.mib("temporary, MiB", "temporary_bytes"),
        tables.Column("of HF dense", share),
        tables.mib("largest array, MiB", "largest_bytes"),
        tables.mib("process growth, MiB", "process_bytes"),
    ]


def share_of_dense(rows: list[Row], row: Row) -> float | None:
    """Temporary memory over that of Hugging Face's dense sublayer."""
    wanted = {"direction": row["direction"], "dtype": row["dtype"]}
    dense = results.one(rows, arm="hf", **wanted)
    return row["temporary_bytes"] / dense["temporary_bytes"] if dense else None


def _note(row: Row) -> str:
    fits = row["largest_bytes"] < row["forbidden_bytes"]
    return "" if fits else "an array of n x 2d or n x f"


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if a cell failed."""
    made = options.parser("memory", __doc__)
    options.add_common(made)
    made.add_argument("--ratios", type=options.ratios, default=[4], help="default: 4")
    made.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    args = made.parse_args(arguments)
    if args.cell:
        print(json.dumps(measure(args.cell)))
        return 0
    with options.refusals(made):
        model = options.settle_common(args)
    settings = options.chosen(args, "batch", "length", "bottleneck", "threads")
    content, console = options.begin("memory", settings, model)
    plugged = [Key(arm, k) for k in args.ratios for arm in PLUGGED]
    plan = [
        {"case": "memory", "direction": way, **key._asdict(), "dtype": dtype, **settings}
        for way in DIRECTIONS
        for dtype in args.dtype
        for key in [*map(Key, DENSE if way == "forward" else DENSE[:1]), *plugged]
    ]
    for cell in track(plan, "measuring", console=console):
        content["rows"].append({**cell, **in_child({**cell, "model": args.model})})
    rows = content["rows"]
    shown = [*columns(rows), tables.mib("with outputs, MiB", "peak_bytes")]
    table = tables.screen("peak memory of the FFN sublayer", shown, rows, note=_note)
    return options.finish(content, options.path_of(args, "memory"), console, table)


if __name__ == "__main__":
    sys.exit(main())
