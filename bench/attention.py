"""Attention over merged keys: grouped_attention against SDPA with a mask that holds its terms.

Both arms get the same merged keys and values. SDPA's mask is made before the clock runs, as a model
makes it once for all layers: T5's terms ``[1, H, n, G]``, or the logarithm of a group's tokens a
key (none at k = 1). Ours looks T5's terms up inside. Memory is a fresh process's growth.
"""

import argparse
import itertools
import json
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from variator_kernels.functional import distance_bias, grouped_attention

from . import internals
from .cases import Arm, Call, Case, Key, models
from .harness import allocations, child, options, results, tables
from .harness.checks import Outputs, Truth, truth
from .harness.clock import Wall
from .harness.results import Row
from .harness.runner import run
from .targets import ATTENTION

TERMS = ("distances", "tokens")
"""T5's relative positions; BERT's merged keys, which count for as many tokens as they are of."""
SDPA = "hf-sdpa"
ARMS = (SDPA, "ours")
SIZES = ((8, 512), (1, 2048))
HEADS, HEAD, BUCKETS = 12, 64, 32
"""Of T5-base and BERT-base."""
in_child = partial(child.measured, "attention")


class Work:
    """Queries, merged keys and values, and what is added to their products."""

    def __init__(self, terms: str, dtype: str, batch: int, length: int, k: int) -> None:
        self.terms, self.dtype, self.k, self.size = terms, models.DTYPES[dtype], k, (batch, length)
        source, groups = models.generator(7), -(-length // k)

        def normal(count: int) -> Tensor:
            return torch.randn(batch, count, HEADS, HEAD, generator=source)

        # What T5 lacks of a scale is in its queries.
        queries = normal(length) * (HEAD**-0.5 if terms == "distances" else 1.0)
        self.inputs = tuple(
            tensor.to(self.dtype) for tensor in (queries, normal(groups), normal(groups))
        )
        self.table = torch.randn(BUCKETS, HEADS, generator=source)
        tokens = torch.full((batch, groups), float(k))
        tokens[:, -1] = length - k * (groups - 1)
        self.members = torch.arange(k) < tokens[..., None]
        self.counts = tokens.log()

    def added(self, wide: torch.dtype = torch.float32) -> dict[str, Any]:
        """The arguments of grouped_attention beside queries, keys and values."""
        if self.terms == "tokens":
            return {"bias": self.counts.to(wide)} if self.k > 1 else {}
        batch, length = self.size
        places = torch.arange(length).expand(batch, -1)
        members = self.members if self.k > 1 else None
        made = distance_bias(
            self.table.to(wide), queries=places, keys=places[:, :: self.k], members=members,
            dtype=wide,
        )  # fmt: skip
        return {"relative": made, "scale": 1.0}

    def exact(self) -> Truth:
        """Float64, and the error of plain PyTorch in the arms' dtype."""
        wide = [tensor.double() for tensor in self.inputs]
        exact = grouped_attention(*wide, **self.added(torch.float64), backend="reference")
        plain = grouped_attention(*self.inputs, **self.added(), backend="reference")
        return truth((exact,), (plain,))

    def call(self, arm: str) -> Call:
        """What is timed, ``[B, n, H, d]``."""
        added = self.added()
        if arm == "ours":
            return lambda: (grouped_attention(*self.inputs, **added),)
        mask = None
        if "bias" in added:
            mask = added["bias"][:, None, None].to(self.dtype)
        elif "relative" in added:  # the same for all rows
            mask = internals.looked_up(added["relative"])[:1].to(self.dtype).contiguous()
        scale = added.get("scale")

        def sdpa() -> Outputs:
            q, k, v = (tensor.transpose(1, 2) for tensor in self.inputs)
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
            return (out.transpose(1, 2),)

        return sdpa


def case(work: Work, name: str, dtype: str) -> Case:
    batch, length = work.size
    made = Case(name, "kernel", "forward", "t5-base" if name == TERMS[0] else "bert-base", dtype,
                batch, length, lambda key: work.exact())  # fmt: skip
    made.arms = [Arm(Key(arm, work.k), partial(work.call, arm), batch * length) for arm in ARMS]
    return made


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
