"""Attention over merged keys: grouped_attention against SDPA with a mask that holds its terms.

What is measured is in ``cases/attention.py``. Memory is a fresh process's growth.
"""

import argparse
import itertools
import json
import sys
from functools import partial

import torch

from .cases import models
from .cases.attention import HEAD, HEADS, SDPA, TERMS, Work, case
from .harness import allocations, child, options, results, tables
from .harness.clock import Wall
from .harness.results import Row
from .harness.runner import run
from .targets import ATTENTION

SIZES = ((8, 512), (1, 2048))
in_child = partial(child.measured, "attention")


@torch.no_grad()
def memory(cell: Row) -> Row:
    """Of one call in this process: its growth, and the largest array that torch allocates."""
    torch.set_num_threads(cell["threads"])
    arm, *size = cell["arm"], cell["terms"], cell["dtype"], cell["batch"], cell["length"], cell["k"]
    small = Work(size[0], size[1], 1, 4 * cell["k"], cell["k"]).call(arm)
    small()  # starts threads
    call = Work(*size).call(arm)
    growth = allocations.grown(call)
    return {"grown_bytes": growth, "largest_bytes": allocations.profiled(call).largest}


def _over(row: Row, quantile: str) -> float | None:
    return results.speedup(row, SDPA, quantile)


COLUMNS = [
    tables.Column("terms of", lambda row: row["case"], True),
    tables.Column("tokens", lambda row: f"{row['batch']} x {row['length']}", True),
    tables.key("dtype", "dtype"),
    tables.key("k", "k"),
    tables.Column("arm", lambda row: "SDPA" if row["arm"] == SDPA else "ours", True),
    tables.number("ms", lambda row: row["median"] * 1e3),
    tables.number("over SDPA", lambda row: _over(row, "median")),
    tables.number("q1", lambda row: _over(row, "q1")),
    tables.number("q3", lambda row: _over(row, "q3")),
    tables.mib("growth, MiB", "grown_bytes"),
    tables.mib("largest array, MiB", "largest_bytes"),
    tables.mib("output, MiB", "output_bytes"),
]


def _note(row: Row) -> str:
    over = _over(row, "median")
    return f"below {ATTENTION:g}" if row["arm"] == "ours" and over and over < ATTENTION else ""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("attention", __doc__)
    add = made.add_argument
    add("--dtype", type=options.words, help="default fp32, and bf16 if the processor has it")
    add("--ratios", type=lambda text: [options.count(w) for w in options.words(text)],
        default=[1, 4], help="of keys, 1 for whole ones; default 1,4")  # fmt: skip
    add("--rounds", type=options.count, default=15, help="default 15")
    add("--quick", action="store_true", help="little work: does everything run?")
    add("--cell", type=json.loads, help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if an arm failed."""
    made = parser()
    args = made.parse_args(arguments)
    if args.cell:
        print(json.dumps(memory(args.cell)))
        return 0
    with options.refusals(made):
        options.settle_dtypes(args)
    settings = options.settings(args) | {"heads": HEADS, "head": HEAD}
    content, console = options.begin("attention", settings, models.architecture("t5-base"))
    path = options.path_of(args, "attention")
    sizes = ((2, 40),) if args.quick else SIZES
    for terms, (batch, length), dtype, k in itertools.product(
        TERMS, sizes, args.dtype, args.ratios
    ):
        work = Work(terms, dtype, batch, length, k)
        rows = run(case(work, terms, dtype), [Wall()], 2 if args.quick else args.rounds, warmup=2)
        for row in results.pick(rows, status="ok"):
            cell = {"arm": row["arm"], "terms": terms, "dtype": dtype, "batch": batch}
            row |= in_child(cell | {"length": length, "k": k, "threads": args.threads})
            row["output_bytes"] = work.inputs[0].nbytes
        content["rows"] += rows
        results.write(path, content)
    title = f"attention, {HEADS} heads of {HEAD}"
    table = tables.screen(title, COLUMNS, content["rows"], section="case", note=_note)
    return options.finish(content, path, console, table)


if __name__ == "__main__":
    sys.exit(main())
