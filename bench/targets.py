"""Targets beside what was measured: ``python -m bench.targets RESULT.json``."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .harness import options, results, tables
from .harness.clock import quartiles
from .harness.results import Row, one, pick, speedup

Measure = Callable[[list[Row]], float | None]
SUBLAYER = {
    "fp32": {2: 1.9, 4: 3.5, 8: 6.2, 16: 9.5, 32: 13.0},
    "bf16": {2: 1.85, 4: 3.4, 8: 6.0, 16: 9.3, 32: 12.5},
}
ENCODER = {"fp32": 1.85, "bf16": 1.5}
WITH_KEYS = {(8, 512): 2.4, (1, 2048): 2.6}
"""Of T5-base and BERT-base with plugins at FFNs, keys and values, in any dtype."""
ATTENTION = 1.3
"""Over SDPA with the same merged keys and a mask that is ready."""
SMALL_DENSE, BACKWARD, RAGGED, MEMORY = 3.0, 1.2, 1.15, 0.4
TRAINING = 0.8


@dataclass(frozen=True)
class Target:
    """A figure to reach; ``limit`` is a minimum, or a maximum if ``at_most``."""

    text: str
    limit: float
    measure: Measure
    at_most: bool = False

    def verdict(self, rows: list[Row]) -> tuple[float | None, str]:
        """What was measured, and met, missed or not measured."""
        value = self.measure(rows)
        if value is None:
            return None, "not measured"
        met = value <= self.limit if self.at_most else value >= self.limit
        return value, "met" if met else "missed"


def _speedup(over: str, **wanted: object) -> Measure:
    return lambda rows: speedup(one(rows, arm="ours", **wanted), over)


def _worst(over: str, least: int = 1, **wanted: object) -> Measure:
    """The least speed-up among all inputs of ``least`` tokens a row or more, and all ratios."""

    def measure(rows: list[Row]) -> float | None:
        cells = [row for row in pick(rows, arm="ours", **wanted) if row["length"] >= least]
        found = [speedup(row if row["status"] == "ok" else None, over) for row in cells]
        values = [value for value in found if value is not None]
        return min(values) if values and len(values) == len(found) else None

    return measure


def _ragged(dtype: str) -> Measure:
    """Time a real token of the ragged batch over that of the full one, by round."""

    def measure(rows: list[Row]) -> float | None:
        wanted = {"case": "ragged", "dtype": dtype, "arm": "ours", "k": 4}
        ragged, full = one(rows, padding="ragged", **wanted), one(rows, padding="none", **wanted)
        if ragged is None or full is None:
            return None
        share = ragged["tokens"] / full["tokens"]
        pairs = zip(ragged["samples"], full["samples"], strict=True)
        return quartiles([a / b / share for a, b in pairs])["median"]

    return measure


def _memory(dtype: str) -> Measure:
    def measure(rows: list[Row]) -> float | None:
        wanted = {"case": "memory", "direction": "forward", "dtype": dtype}
        ours, dense = one(rows, arm="ours", k=4, **wanted), one(rows, arm="hf", **wanted)
        return ours["temporary_bytes"] / dense["temporary_bytes"] if ours and dense else None

    return measure


def _largest(dtype: str) -> Measure:
    """The largest single allocation, over an array of n x 2d or n x f, whichever is smaller."""
    wanted = {"case": "memory", "dtype": dtype, "arm": "ours", "status": "ok"}
    share = lambda row: row["largest_bytes"] / row["forbidden_bytes"]  # noqa: E731
    return lambda rows: results.best(pick(rows, **wanted), share)


def _training(dtype: str) -> Measure:
    """Time of a training step, over the eager reference's."""
    wanted, name = {"case": "training", "dtype": dtype, "arm": "ours"}, "over_reference"
    return lambda rows: row[name]["median"] if (row := one(rows, **wanted)) else None


def _targets() -> list[Target]:
    made = []

    def add(text: str, limit: float, measure: Measure, at_most: bool = False) -> None:
        made.append(Target(text, limit, measure, at_most))

    for dtype, limits in SUBLAYER.items():
        for k, limit in limits.items():
            cell = {"case": "sublayer", "dtype": dtype, "k": k}
            add(f"FFN sublayer, {dtype}, k={k}: speed-up over dense with packed weights", limit,
                _speedup("dense-packed", **cell))  # fmt: skip
    for dtype, limit in ENCODER.items():
        add(f"whole encoder, {dtype}, k=4: speed-up over Hugging Face SDPA", limit,
            _speedup("hf-sdpa", case="encoder", dtype=dtype, k=4, placements=["ffn"],
                     model="t5-base", batch=8, length=512))  # fmt: skip
    for dtype in ENCODER:
        both = {"case": "encoder", "dtype": dtype, "placements": ["ffn", "attention_kv"]}
        for model in ("t5-base", "bert-base"):
            for (batch, length), limit in WITH_KEYS.items():
                cell = {"k": 4, "model": model, "batch": batch, "length": length, **both}
                add(f"{model}, ffn + attention_kv, {batch} x {length}, {dtype}, k=4: speed-up over "
                    "Hugging Face SDPA", limit, _speedup("hf-sdpa", **cell))  # fmt: skip
        add(f"ffn + attention_kv, {dtype}, from 128 tokens: least speed-up over ffn alone", 1.0,
            _worst("ours, ffn", 128, **both))  # fmt: skip
        add(f"attention alone, {dtype}, any k: least speed-up over SDPA", ATTENTION,
            _worst("hf-sdpa", scope="kernel", dtype=dtype))  # fmt: skip
    for dtype in ENCODER:
        cell = {"dtype": dtype, "k": 4}
        small = {"case": "small", "batch": 1, "length": 512, **cell}
        add(f"1 x 128 and 1 x 512, {dtype}, any k: least speed-up over the eager reference", 1.0,
            _worst("reference", case="small", dtype=dtype))  # fmt: skip
        add(f"1 x 512, {dtype}, k=4: speed-up over dense with packed weights", SMALL_DENSE,
            _speedup("dense-packed", **small))  # fmt: skip
        add(f"forward and backward, {dtype}, k=4: speed-up over the eager reference", BACKWARD,
            _speedup("reference", case="backward", **cell))  # fmt: skip
        add(f"ragged batch, {dtype}, k=4: time a real token, over the full batch's", RAGGED,
            _ragged(dtype), True)  # fmt: skip
        add(f"temporary memory of a forward, {dtype}, k=4: share of the dense sublayer's", MEMORY,
            _memory(dtype), True)  # fmt: skip
        add(f"largest array, {dtype}: share of n x 2d (must be smaller)", 0.999,
            _largest(dtype), True)  # fmt: skip
        add(f"a step of plugin training, {dtype}, k=4: time over the eager reference's", TRAINING,
            _training(dtype), True)  # fmt: skip
    return made


TARGETS = _targets()


def verdicts(rows: list[Row]) -> list[tuple[Target, float | None, str]]:
    """Every target with what was measured."""
    return [(target, *target.verdict(rows)) for target in TARGETS]


def columns(digits: int) -> list[tables.Column]:
    """Of a table of :func:`as_rows`."""
    measured = tables.number("measured", lambda row: row["value"], f".{digits}f")
    return [tables.key("target", "text"), tables.key("limit", "limit"), measured,
            tables.key("", "verdict")]  # fmt: skip


def as_rows(rows: list[Row]) -> list[Row]:
    """The verdicts on results, as rows of a table."""

    def row(target: Target, value: float | None, verdict: str) -> dict[str, Any]:
        limit = f"{'at most' if target.at_most else 'at least'} {target.limit:g}"
        return {"text": target.text, "limit": limit, "value": value, "verdict": verdict}

    return [row(*found) for found in verdicts(rows)] if rows else []


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.targets", description=__doc__)
    parser.add_argument("result", nargs="+", type=Path, help="speed_vs_k.json, memory.json")
    paths = parser.parse_args(arguments).result
    found = as_rows([row for path in paths for row in results.read(path)["rows"]])
    options.screen().print(tables.screen("targets", columns(3), found))
    return int(any(row["verdict"] == "missed" for row in found))


if __name__ == "__main__":
    sys.exit(main())
