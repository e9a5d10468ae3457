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
from .harness import options, results, tables
from .harness.checks import judge, truth
from .harness.clock import Wall, quartiles, ratio
from .harness.results import Row

RATIOS = [2, 4, 8, 16, 32]
SLACK = {4: 0.015}
"""Of the sublayer's time, at most, at k = 4; elsewhere the count's share and a hundredth."""


def multiply_adds(ffn: vk.FeedForward, batch: int, length: int, k: int, kept: int,
                  bottleneck: int) -> int:  # fmt: skip
    """Of the sublayer over ``batch`` rows of ``length`` tokens, each with its first ones whole."""
    d, f = ffn.w_in.shape[1], ffn.w_in.shape[0]
    merged = batch * (length - kept)
    groups = batch * -(-(length - kept) // k)
    work = (groups + batch * kept) * vk.flops.ffn_macs(d, f, ffn.w_gate is not None)
    work += vk.flops.merge_macs(merged, d, k)
    return work + vk.flops.decompress_macs(merged, groups, d, bottleneck)


@torch.no_grad()
def measure(args: Any, model: models.Architecture, dtype: str, k: int) -> list[Row]:
    """Both arms of a ratio."""
    kind, config = models.DTYPES[dtype], model.config
    _, ffn = models.sublayer(model, kind)
    plugin = models.plugin(config, k, args.bottleneck, kind)
    x = models.hidden(args.batch, args.length, config.hidden_size, kind)
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
        sizes = args.batch, args.length, k, kept, args.bottleneck
        row |= {"multiply_adds": multiply_adds(ffn, *sizes)}
        row |= {"status": "ok", "error": verdict.error, "allowed": verdict.allowed}
        if not verdict.ok:
            row |= {"status": "failed", "reason": verdict.reason}
        calls[kept] = partial(run, x, plugin, ffn, backend="cpu")
        rows.append(row)
    if any(row["status"] != "ok" for row in rows):
        return rows
    samples, _ = Wall().interleave(calls, args.rounds, settle=True)
    whole = rows[0]["multiply_adds"]
    for row in rows:
        own = samples[row["kept"]]
        row |= {"samples": own, **quartiles(own), "over": ratio(own, samples[0])}
        row["share"] = row["multiply_adds"] / whole - 1
        row["limit"] = 1 + SLACK.get(row["k"], row["share"] + 0.01)
    return rows


COLUMNS = [
    tables.key("dtype", "dtype"),
    tables.key("k", "k"),
    tables.Column("ms", tables.milliseconds),
    tables.Column("over merging it", lambda row: _times(row.get("over"))),
    tables.number("by the count", lambda row: 1 + row["share"], ".3f"),
    tables.number("at most", lambda row: row["limit"], ".3f"),
]


def _times(found: Row | None) -> str:
    return (
        "" if found is None else f"{found['median']:.3f} ({found['q1']:.3f} to {found['q3']:.3f})"
    )


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
    try:
        model = options.settle_common(args)
    except ValueError as error:
        made.error(str(error))
    names = ("batch", "length", "ratios", "keep", "bottleneck", "rounds", "threads")
    content, console = options.begin(
        "keeping", {name: getattr(args, name) for name in names}, model
    )
    cells = [(dtype, k) for dtype in args.dtype for k in args.ratios]
    for dtype, k in track(cells, "keeping", console=console):
        content["rows"] += measure(args, model, dtype, k)
    path = results.folder(args.output, args.publish) / "keeping.json"
    title = f"first {args.keep} of {args.batch} x {args.length} tokens kept whole"
    table = tables.screen(title, COLUMNS, shown(content["rows"]), note=_note)
    return options.finish(content, path, console, table)


def _note(row: Row) -> str:
    return "met" if row["over"]["median"] <= row["limit"] else "missed"


if __name__ == "__main__":
    sys.exit(main())
