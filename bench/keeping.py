"""What keeping tokens whole costs: an FFN sublayer that keeps the first token of each row, over the
same one that merges it.

The kept token is one group more a row. The count's share is what that adds to the multiply-adds.
Each arm is judged by float64 before it is timed; the arms take turns.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.progress import track

import variator_kernels as vk

from .cases import models
from .cases.sublayer import Sublayer
from .harness import options, results, tables
from .harness.checks import judge, truth
from .harness.clock import Wall, quartiles, ratio
from .harness.results import Row

RATIOS = [2, 4, 8, 16, 32]
SLACK = {4: 0.015}
"""Of the sublayer's time, at most, at k = 4; elsewhere the count's share and a hundredth."""


@torch.no_grad()
def measure(args: Any, model: models.Architecture, dtype: str, k: int) -> list[Row]:
    """Both arms of a ratio."""
    layer = Sublayer(model, dtype, args.batch, args.length, args.bottleneck)
    x, plugin, ffn = layer.x, layer.plugin(k), layer.ffn
    wide = models.moved(plugin, torch.float64), models.moved(ffn, torch.float64)
    rows: list[Row] = []
    calls: dict[int, Callable[[], Any]] = {}
    for kept in (0, args.keep):
        run = partial(vk.functional.compressed_ffn, keep_first=kept)
        exact = run(x.double(), *wide, backend="reference")
        plain = run(x, plugin, ffn, backend="reference")
        verdict = judge((run(x, plugin, ffn, backend="cpu"),), truth((exact,), (plain,)))
        row: Row = {"case": "keeping", "arm": f"keep_first={kept}", "kept": kept, "k": k}
        row |= {"dtype": dtype, "batch": args.batch, "length": args.length}
        merged, whole = [args.length - kept] * args.batch, [kept] * args.batch
        row["multiply_adds"] = layer.macs(merged, k) + layer.macs(whole, None)
        rows.append(row | verdict.row())
        calls[kept] = partial(run, x, plugin, ffn, backend="cpu")
    if any(row["status"] != "ok" for row in rows):
        return rows
    samples, _ = Wall().interleave(calls, args.rounds, settle=True)
    for row in rows:
        own = samples[row["kept"]]
        row |= {"samples": own, **quartiles(own), "over": ratio(own, samples[0])}
        row["share"] = row["multiply_adds"] / rows[0]["multiply_adds"] - 1
        row["limit"] = 1 + SLACK.get(row["k"], row["share"] + 0.01)
    return rows


COLUMNS = [
    tables.key("dtype", "dtype"),
    tables.key("k", "k"),
    tables.Column("ms", tables.milliseconds),
    tables.Column("over merging it", lambda row: tables.times(row.get("over"), 3)),
    tables.number("by the count", lambda row: 1 + row["share"], ".3f"),
    tables.number("at most", lambda row: row["limit"], ".3f"),
]


def shown(rows: list[Row]) -> list[Row]:
    """The arm that keeps tokens, over the other."""
    return [row for row in results.pick(rows, case="keeping", status="ok") if row["kept"]]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if a check failed."""
    made = options.parser("keeping", __doc__)
    options.add_common(made)
    made.add_argument("--ratios", type=options.ratios, default=RATIOS, help="default 2,4,8,16,32")
    made.add_argument("--keep", type=options.count, default=1, help="first tokens; default 1")
    made.add_argument("--rounds", type=options.count, default=31, help="default 31")
    args = made.parse_args(arguments)
    with options.refusals(made):
        model = options.settle_common(args)
    names = ("batch", "length", "ratios", "keep", "bottleneck", "rounds", "threads")
    content, console = options.begin("keeping", options.chosen(args, *names), model)
    cells = [(dtype, k) for dtype in args.dtype for k in args.ratios]
    for dtype, k in track(cells, "keeping", console=console):
        content["rows"] += measure(args, model, dtype, k)
    title = f"first {args.keep} of {args.batch} x {args.length} tokens kept whole"
    table = tables.screen(title, COLUMNS, shown(content["rows"]), note=_note)
    return options.finish(content, options.path_of(args, "keeping"), console, table)


def _note(row: Row) -> str:
    return "met" if row["over"]["median"] <= row["limit"] else "missed"


if __name__ == "__main__":
    sys.exit(main())
