"""Peak memory of the FFN sublayer: a forward, and a forward with backward, by arm.

Each cell runs in a fresh process. ``temporary`` is what torch allocates at most beside the outputs;
``process`` is by how much the process grew, outputs and the kernels' own memory included. A cell
whose outputs are not right has no number, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .common import allocations, cells, cost, machine, models, options, results, sublayer
from .common.cells import Key
from .common.checks import factor_of, judge
from .common.compiling import Unavailable
from .common.results import Row

DENSE, PLUGGED = ("hf", "dense-packed"), ("reference", "ours")
DIRECTIONS = ("forward", "backward")
MIB = 2**20


def build(layer: sublayer.Sublayer, key: Key, direction: str) -> cells.Call:
    """The call of an arm."""
    if direction == "backward":
        return layer.gradients(key.arm, key.k) if key.k else layer.dense_gradients()
    return layer.plugged(key.arm, key.k) if key.k else layer.dense(key.arm)


def measure(cell: Row) -> Row:
    """One cell, in this process: a small warm-up, the process's growth, the allocations."""
    torch.set_num_threads(cell["threads"])
    model = models.architecture(cell["model"])
    key, direction = Key(cell["arm"], cell["k"]), cell["direction"]
    sizes = (cell["batch"], cell["length"], cell["bottleneck"])
    layer = sublayer.Sublayer(model, cell["dtype"], *sizes)
    full = layer.x
    with torch.set_grad_enabled(direction == "backward"):
        try:
            call = build(layer, key, direction)
            layer.x = full[:1, :64]
            call()  # packs weights, starts threads
            layer.x = full
            growth = allocations.grown(call)
            taken = allocations.profiled(call)
            exact = layer.measure_backward if direction == "backward" else layer.measure
            verdict = judge(call(), exact(key), factor_of(key.arm))
        except Unavailable as error:
            return {"status": "skipped", "reason": str(error)}
    if not verdict.ok:
        reason = f"error {verdict.error:.3g}, allowed {verdict.allowed:.3g}"
        return {"status": "failed", "reason": reason}
    config, item = model.config, layer.x.element_size()
    width = min(2 * config.hidden_size, cost.inner_size(config))
    return {
        "status": "ok",
        "reason": "",
        "error": verdict.error,
        "allowed": verdict.allowed,
        "peak_bytes": taken.peak,
        "temporary_bytes": taken.temporary,
        "largest_bytes": taken.largest,
        "output_bytes": taken.outputs,
        "process_bytes": growth,
        "forbidden_bytes": cell["batch"] * cell["length"] * width * item,
    }


def in_child(cell: Row) -> Row:
    """:func:`measure` in a fresh process."""
    command = [sys.executable, "-m", "bench.memory", "--cell", json.dumps(cell)]
    paths = [str(machine.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"status": "failed", "reason": lines[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: list[Row]) -> Table:
    """All cells; MiB."""
    made = Table(title="peak memory of the FFN sublayer, MiB", title_justify="left")
    made.add_column("cell")
    for name in ("temporary", "of dense", "with outputs", "largest array", "process"):
        made.add_column(name, justify="right")
    made.add_column("note")
    for row in rows:
        k = f", k={row['k']}" if row["k"] else ""
        name = f"{row['direction']}, {row['dtype']}, {row['arm']}{k}"
        if row["status"] != "ok":
            made.add_row(name, row["status"].upper(), "", "", "", "", row["reason"])
            continue
        keys = ("temporary_bytes", "peak_bytes", "largest_bytes", "process_bytes")
        mib = ["" if row[key] is None else f"{row[key] / MIB:.1f}" for key in keys]
        share = share_of_dense(rows, row)
        fits = row["largest_bytes"] < row["forbidden_bytes"]
        note = "" if fits else "an array of n x 2d or n x f"
        made.add_row(name, mib[0], f"{share:.0%}" if share else "", *mib[1:], note)
    return made


def share_of_dense(rows: list[Row], row: Row) -> float | None:
    """Temporary memory over that of Hugging Face's dense sublayer."""
    wanted = {"direction": row["direction"], "dtype": row["dtype"]}
    dense = results.one(rows, arm="hf", **wanted)
    return row["temporary_bytes"] / dense["temporary_bytes"] if dense else None


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    options.add_common(parser)
    parser.add_argument("--ratios", type=options.ratios, default=[4], help="default: 4")
    parser.add_argument("--quick", action="store_true", help="little work: does everything run?")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.cell:
        print(json.dumps(measure(args.cell)))
        return 0
    try:
        options.settle_common(args)
        model = models.architecture(args.model)
    except ValueError as error:
        parser.error(str(error))
    names = ("batch", "length", "bottleneck", "threads")
    settings: dict[str, Any] = {name: getattr(args, name) for name in names}
    content = results.result("memory", settings, options.describe(model))
    console = Console(width=None if sys.stdout.isatty() else 150)
    options.print_head(console, content)
    plugged = [Key(arm, k) for k in args.ratios for arm in PLUGGED]
    plan = [
        {"case": "memory", "direction": way, "dtype": dtype, **key._asdict(), **settings}
        for way in DIRECTIONS
        for dtype in args.dtype
        for key in [*map(Key, DENSE if way == "forward" else DENSE[:1]), *plugged]
    ]
    for cell in track(plan, "measuring", console=console):
        content["rows"].append({**cell, **in_child({**cell, "model": args.model})})
    path = results.folder(args.output, args.publish) / "memory.json"
    results.write(path, content)
    console.print(table(content["rows"]), f"written: {options.shown(path)}")
    return int(any(row["status"] == "failed" for row in content["rows"]))


if __name__ == "__main__":
    sys.exit(main())
