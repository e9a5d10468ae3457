"""One product of frozen weights: this package's kernels beside oneDNN's, by the number of rows.

This is what decides which of them runs (``ops/rows_linear.py``, ``ops/prepacked_linear.py``): ours
in floating point and in int8, oneDNN's on weights that it packed, and ``F.linear`` on weights as
they are. The arms of a product take turns; each is checked against float64 before and after it is
timed, int8 by a bound on its relative error. Here a weight stays in the caches, which in a
whole model it does not.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import internals
from .cases import Arm, Call, Case, Key, models
from .harness import options, results, tables
from .harness.checks import QUANTISED, Outputs, Truth, truth
from .harness.clock import Wall
from .harness.compiling import Unavailable
from .harness.results import Row, pick
from .harness.runner import run

SHAPES = {"in": (768, 3072), "out": (3072, 768), "queries, keys, values": (768, 2304),
          "attention's output": (768, 768)}  # fmt: skip
"""Of T5-base and BERT-base: numbers that go in and come out."""
ROWS = (1, 8, 32, 128, 512, 2048)
OURS, ONEDNN, PLAIN = "ours", "onednn", "linear"
INT8 = "int8"
ARMS = {OURS: "ours", INT8: "ours, int8", ONEDNN: "oneDNN, packed", PLAIN: "F.linear"}


def case(name: str, dtype: str, rows: int) -> Case:
    """The arms on one product."""
    kind, (inner, outputs) = models.DTYPES[dtype], SHAPES[name]
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(outputs, inner).mul_(inner**-0.5).to(kind), False)
    x = torch.randn(rows, inner).to(kind)
    exact = (F.linear(x.double(), weight.double()),)

    def measure(key: Key) -> Truth:
        if key.dtype == INT8:
            return Truth(exact, (), QUANTISED)
        return truth(exact, (F.linear(x, weight),))

    made = Case(name, "kernel", "forward", "t5-base", dtype, 1, rows, measure)
    for arm in ARMS:
        key = Key(OURS, dtype=INT8) if arm == INT8 else Key(arm, dtype=dtype)
        made.arms.append(Arm(key, partial(_call, arm, weight, x), rows))
    return made


def _call(arm: str, weight: nn.Parameter, x: Tensor) -> Call:
    multiply: Callable[[Tensor], Tensor] | None
    if arm == PLAIN:
        multiply = partial(F.linear, weight=weight)
    else:
        multiply = internals.product(arm, weight, len(x))
    if multiply is None:
        raise Unavailable("does not run here")

    def call() -> Outputs:
        return (multiply(x),)

    return call


def columns(rows: Iterable[Row]) -> list[tables.Column]:
    """GFLOP/s of each arm that has a number somewhere."""
    found = {(row["arm"], row["dtype"]) for row in rows if row["status"] == "ok"}

    def rate(arm: str) -> tables.Column:
        return tables.number(f"{ARMS[arm]}, GFLOP/s", lambda row: row.get(arm), ".0f")

    has = {INT8 if dtype == INT8 else arm for arm, dtype in found}
    first = [tables.key("product", "case"), tables.key("numbers", "numbers"),
             tables.key("dtype", "dtype"), tables.key("rows", "length")]  # fmt: skip
    return first + [rate(arm) for arm in ARMS if arm in has]


def lines(rows: list[Row]) -> list[Row]:
    """A row a product, dtype and number of rows, with each arm's GFLOP/s."""
    made: dict[Any, Row] = {}
    for row in pick(rows, status="ok"):
        inner, outputs = SHAPES[row["case"]]
        line = made.setdefault((row["case"], row["of"], row["length"]), {
            "case": row["case"], "numbers": f"{inner} to {outputs}", "dtype": row["of"],
            "length": row["length"],
        })  # fmt: skip
        arm = INT8 if row["dtype"] == INT8 else row["arm"]
        line[arm] = 2 * row["length"] * inner * outputs / row["median"] / 1e9
    return list(made.values())


def _counts(text: str) -> list[int]:
    return [options.count(word) for word in options.words(text)]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if an arm failed."""
    made = options.parser("products", __doc__)
    made.add_argument("--dtype", type=options.words, help="default fp32, and bf16 if it is here")
    made.add_argument("--rows", type=_counts, default=list(ROWS),
                      help=f"default {','.join(map(str, ROWS))}")  # fmt: skip
    made.add_argument("--rounds", type=options.count, default=15, help="default 15")
    args = made.parse_args(arguments)
    with options.refusals(made):
        options.settle_dtypes(args)
        options.check("dtype", args.dtype, models.DTYPES)
    settings = options.chosen(args, "threads", "rounds", "dtype", "rows")
    content, console = options.begin("products", settings, models.architecture("t5-base"))
    path = options.path_of(args, "products")
    with torch.no_grad():
        for name in SHAPES:
            for dtype in args.dtype:
                for rows in args.rows:
                    found = run(case(name, dtype, rows), [Wall()], args.rounds, warmup=2)
                    content["rows"] += [{**row, "of": dtype} for row in found]
            results.write(path, content)
    shown = lines(content["rows"])
    table = tables.screen("products", columns(content["rows"]), shown)
    return options.finish(content, path, console, table)


if __name__ == "__main__":
    sys.exit(main())
