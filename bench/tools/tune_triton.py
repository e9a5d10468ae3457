"""Finds launch settings on this GPU for the table: ``python -m bench.tools.tune_triton``.

For each kernel of the forward pass every candidate is put into the table in turn, the sublayer is
checked against float64 and timed by CUDA-graph replay behind an L2 flush; the fastest right one
stays. Kernels are tuned one after the other, each with the best of those before it, in equal shares
of the time. Worker processes compile the candidates meanwhile. Needs a GPU.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.cases import Key, models
from bench.cases.sublayer import Sublayer
from bench.harness.checks import judge
from bench.harness.clock import Graph, quartiles
from variator_kernels.triton_kernels import launch

Settings = dict[str, Any]
CASES = {"t5-base": (32, 512), "t5-large": (32, 512), "bert-base": (32, 512), "llama-7b": (8, 2048)}
CONFIGS = {name: models.SUBLAYERS[name] for name in CASES}
TMA_TILES = [(128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (128, 64, 4), (64, 256, 4)]


def _grid(**values: tuple) -> list[Settings]:
    return [dict(zip(values, made, strict=True)) for made in itertools.product(*values.values())]


def _products(tiles: list[tuple[int, int, int]]) -> list[Settings]:
    found: list[Settings] = [{"products": "torch"}]
    choices = itertools.product(tiles, (64, 128), (3, 4), (0, 1, 2))
    for (bm, bn, warps), bk, stages, persistent in choices:
        found.append(
            {"products": "triton", "bm": bm, "bn": bn, "bk": bk, "group": 8, "tma": True,
             "persistent": persistent, "warps": warps, "stages": stages}
        )  # fmt: skip
    return found


CANDIDATES: dict[str, list[Settings]] = {
    "group_merge": _grid(bt=(32, 64, 128), bd=(64, 128), bs=(128, 256), br=(64,), warps=(4, 8),
                         stages=(2, 3, 4)),
    "weighted_sum": _grid(bg=(4, 8, 16), bs=(128, 256), warps=(4, 8), stages=(2,)),
    "linear_in": _products(TMA_TILES),
    "linear_gated": _products(TMA_TILES[2:]),
    "linear_out": _products(TMA_TILES),
    "adapter_decompress": _grid(bt=(32, 64, 128), bd=(64, 128, 256), br=(64,), warps=(4, 8),
                                stages=(1, 2, 3, 4)),
    "row_norm": _grid(bt=(1, 2, 4, 8), warps=(4, 8), stages=(1,)),
}  # fmt: skip


def _row(kernel: str, case: dict[str, Any], settings: Settings) -> dict[str, Any]:
    return {"kernel": kernel, "case": case, "settings": settings}


class Table:
    """The launch table with rows that can be exchanged while it is in use."""

    def __init__(self, path: Path) -> None:
        self.rows, self.path = list(launch.table()), path

    def put(self, kernel: str, case: dict[str, Any], settings: Settings) -> None:
        self.rows = [*self._without(kernel, case), _row(kernel, case, settings)]
        launch.use(self.rows)

    def drop(self, kernel: str, case: dict[str, Any]) -> None:
        self.rows = self._without(kernel, case)
        launch.use(self.rows)

    def _without(self, kernel: str, case: dict[str, Any]) -> list[dict[str, Any]]:
        return [r for r in self.rows if (r["kernel"], r["case"]) != (kernel, case)]

    def write(self) -> None:
        lines = ",\n".join("  " + json.dumps(row) for row in self.rows)
        self.path.write_text(f"[\n{lines}\n]\n")


def compile_ahead(model: str, k: int, row: dict[str, Any]) -> None:
    """Compiles the forward pass with one more row in the table, in a worker, for Triton's cache."""
    from bench.tools.triton_cases import MODELS, sublayer
    from bench.tools.triton_compiler import compile_call

    launch.use([*json.loads(launch.TABLE.read_text()), row])
    call = sublayer(MODELS[model], k, torch.bfloat16, backward=False)
    with contextlib.suppress(Exception):  # it fails again, and is noted, when its turn comes
        compile_call(row["case"]["arch"], call)


def tune(
    model: str, k: int, table: Table, clock: Graph, until: float, rounds: int,
    workers: Executor | None = None,
) -> list[dict]:  # fmt: skip
    """Tunes one sublayer; what was tried, with times."""
    architecture = models.Architecture(model, CONFIGS[model](), None)
    layer = Sublayer(architecture, "bf16", *CASES[model], device=clock.device, kernels="triton")
    with torch.no_grad():
        measure, call = layer.measure(Key("ours", k)), layer.build(Key("ours", k))
    tried: list[dict] = []

    def seconds() -> float | None:
        """None for settings that do not fit on the chip or compute something else."""
        try:
            with torch.no_grad():
                if not judge(call(), measure).ok:
                    return None
                replay = {"": clock.prepare(call)}
                return quartiles(clock.interleave(replay, rounds)[0][""])["median"]
        except Exception as error:
            clock.works()  # waits for what was launched
            tried.append({"error": f"{type(error).__name__}: {error}"[:200]})
            return None

    plan = []
    launched = _launched(call)
    for kernel in (name for name in CANDIDATES if name in launched):
        of = launched[kernel]
        # In any order, so that a share of the time tries a share of everything.
        candidates = random.Random(0).sample(CANDIDATES[kernel], len(CANDIDATES[kernel]))
        compiled: list[Any] = [lambda: None] * len(candidates)
        if workers:
            rows = (_row(kernel, of, candidate) for candidate in candidates)
            compiled = [workers.submit(compile_ahead, model, k, row).exception for row in rows]
        plan.append((kernel, of, zip(candidates, compiled, strict=True)))
    for place, (kernel, of, candidates_of) in enumerate(plan):
        best, best_seconds = None, seconds()
        tried.append({**_row(kernel, of, {}), "seconds": best_seconds})
        end = time.monotonic() + (until - time.monotonic()) / (len(plan) - place)
        for candidate, ready in candidates_of:
            if time.monotonic() > end:
                break
            ready()
            table.put(kernel, of, candidate)
            found = seconds()
            tried.append({**_row(kernel, of, candidate), "seconds": found})
            if found is not None and (best_seconds is None or found < best_seconds):
                best, best_seconds = candidate, found
        if best is None:
            table.drop(kernel, of)  # the row in use before was the best
        else:
            table.put(kernel, of, best)
        table.write()  # what comes may crash the device
        print(f"{model} k={k} {kernel}: {best or 'as before'}, {best_seconds} s", flush=True)
    return tried


@torch.no_grad()
def _launched(call: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    """The kernels whose settings a call looks up, and what for."""
    found: dict[str, dict[str, Any]] = {}
    settings = launch.settings

    def noting(kernel: str, **case: Any) -> Settings:
        found[kernel] = case
        return settings(kernel, **case)

    with mock.patch.object(launch, "settings", noting):
        call()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", nargs="+", choices=CONFIGS, default=["t5-base"])
    parser.add_argument("--ratio", nargs="+", type=int, default=[4])
    parser.add_argument("--seconds", type=float, default=400, help="no candidate starts after it")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=launch.TABLE)
    parser.add_argument("--log", type=Path, help="a JSON file for everything that was tried")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: PyTorch sees none")
        return 2
    table, clock, tried = Table(chosen.output), Graph("cuda"), []
    until = time.monotonic() + chosen.seconds
    sublayers = list(itertools.product(chosen.model, chosen.ratio))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as workers:
        for place, (model, k) in enumerate(sublayers):
            end = time.monotonic() + (until - time.monotonic()) / (len(sublayers) - place)
            tried += tune(model, k, table, clock, end, chosen.rounds, workers)
            if chosen.log:
                chosen.log.write_text(json.dumps(tried, indent=1) + "\n")
        workers.shutdown(cancel_futures=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
