"""Finds launch settings on this GPU and writes them to the table: ``python -m bench.tune_triton``.

For each kernel of the forward pass every candidate is put into the table in turn, the sublayer is
checked against float64 and timed by CUDA-graph replay behind an L2 flush; the fastest right one
stays. Kernels are tuned one after the other, each with the best of those before it. Needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.common.checks import factor_of, judge
from bench.common.timing import quartiles
from variator_kernels.triton_kernels import launch

from .gpu.clock import Clock
from .gpu.measure import Arms
from .gpu.sublayers import MODELS, Sublayer

Settings = dict[str, Any]
CASES = {"t5-base": (32, 512), "t5-large": (32, 512), "bert-base": (32, 512), "llama-7b": (8, 2048)}
TMA_TILES = [(128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (128, 64, 4), (64, 256, 4)]


def _grid(**values: tuple) -> list[Settings]:
    return [dict(zip(values, made, strict=True)) for made in itertools.product(*values.values())]


def _products(tiles: list[tuple[int, int, int]]) -> list[Settings]:
    found: list[Settings] = [{"products": "torch"}]
    for (bm, bn, warps), bk, stages, persistent in itertools.product(
        tiles, (64, 128), (3, 4), (0, 1, 2)
    ):
        found.append(
            {"products": "triton", "bm": bm, "bn": bn, "bk": bk, "group": 8, "tma": True,
             "persistent": persistent, "warps": warps, "stages": stages}
        )  # fmt: skip
    return found


CANDIDATES: dict[str, list[Settings]] = {
    "group_merge": _grid(
        bt=(32, 64, 128), bd=(64, 128), bs=(128, 256), warps=(4, 8), stages=(2, 3, 4)
    ),
    "weighted_sum": _grid(bg=(4, 8, 16), bs=(128, 256), warps=(4, 8), stages=(2,)),
    "linear_in": _products(TMA_TILES),
    "linear_gated": _products(TMA_TILES[2:]),
    "linear_out": _products(TMA_TILES),
    "adapter_decompress": _grid(
        bt=(32, 64, 128), bd=(64, 128, 256), warps=(4, 8), stages=(1, 2, 3, 4)
    ),
    "row_norm": _grid(bt=(1, 2, 4, 8), warps=(4, 8), stages=(1,)),
}


class Table:
    """The launch table with rows that can be exchanged while it is in use."""

    def __init__(self) -> None:
        self.rows = list(launch.table())

    def put(self, kernel: str, case: dict[str, Any], settings: Settings) -> None:
        self.rows = [r for r in self.rows if (r["kernel"], r["case"]) != (kernel, case)]
        self.rows.append({"kernel": kernel, "case": case, "settings": settings})
        launch.use(self.rows)

    def drop(self, kernel: str, case: dict[str, Any]) -> None:
        self.rows = [r for r in self.rows if (r["kernel"], r["case"]) != (kernel, case)]
        launch.use(self.rows)

    def write(self, path: Path) -> None:
        path.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in self.rows) + "\n]\n")


def tune(model: str, k: int, table: Table, clock: Clock, until: float, rounds: int) -> list[dict]:
    """Tunes one sublayer; what was tried, with times."""
    layer = Sublayer(MODELS[model], *CASES[model], clock.device, torch.bfloat16)
    arms = Arms(layer, k, backward=False, kernels="triton")
    measure, call = arms.truth("ours"), arms.call("ours")
    case = {"arch": launch.arch(layer.x), "d": layer.model.d, "f": layer.model.f, "k": k,
            "dtype": launch.name(layer.dtype)}  # fmt: skip
    tried: list[dict] = []

    def seconds() -> float | None:
        """None for settings that do not fit on the chip or compute something else."""
        try:
            if not judge(call(), measure, factor_of("ours")).ok:
                return None
            replay = clock.graphed(call)
            return quartiles(clock.interleaved({"": replay}, rounds)[""])["median"]
        except Exception as error:
            clock.synchronize()
            tried.append({"error": f"{type(error).__name__}: {error}"[:200]})
            return None

    launched = _launched(call)
    for kernel in (name for name in CANDIDATES if name in launched):
        of = {key: case[key] for key in ("arch", "d", "k", "dtype")}
        if kernel.startswith("linear"):
            of = {**of, "f": case["f"], "activation": layer.ffn.activation}
            if kernel == "linear_out":
                of["activation"] = "none"
        best, best_seconds = None, seconds()
        tried.append({"kernel": kernel, "case": of, "settings": None, "seconds": best_seconds})
        for candidate in CANDIDATES[kernel]:
            if time.monotonic() > until:
                break
            table.put(kernel, of, candidate)
            found = seconds()
            tried.append({"kernel": kernel, "case": of, "settings": candidate, "seconds": found})
            if found is not None and (best_seconds is None or found < best_seconds):
                best, best_seconds = candidate, found
        if best is None:
            table.drop(kernel, of)  # the row in use before was the best
        else:
            table.put(kernel, of, best)
        print(f"{model} k={k} {kernel}: {best or 'as before'}, {best_seconds} s", flush=True)
    return tried


def _launched(call: Callable[[], Any]) -> set[str]:
    """The kernels whose settings a call looks up."""
    found: set[str] = set()
    settings = launch.settings

    def noting(kernel: str, **case: Any) -> Settings:
        found.add(kernel)
        return settings(kernel, **case)

    with mock.patch.object(launch, "settings", noting):
        call()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["t5-base"])
    parser.add_argument("--ratio", nargs="+", type=int, default=[4])
    parser.add_argument("--seconds", type=float, default=400, help="no candidate starts after it")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=launch.TABLE)
    parser.add_argument("--log", type=Path, help="a JSON file for everything that was tried")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: PyTorch sees none")
        return 2
    table, clock, tried = Table(), Clock("cuda"), []
    until = time.monotonic() + chosen.seconds
    for model, k in itertools.product(chosen.model, chosen.ratio):
        tried += tune(model, k, table, clock, until, chosen.rounds)
        table.write(chosen.output)
        if chosen.log:
            chosen.log.write_text(json.dumps(tried, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
