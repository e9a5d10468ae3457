"""Memory of the sublayer: what is counted, and that it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import memory
from bench.harness import allocations, machine
from tests.bench.conftest import one_ffn


def test_profiled_counts_temporaries_and_outputs() -> None:
    x = torch.zeros(1000)

    def call() -> tuple[torch.Tensor]:
        held = torch.empty(3000)  # 12,000 bytes, beside another 8,000
        other = torch.empty(2000)
        del held, other
        return (x + 1,)

    taken = allocations.profiled(call)
    assert taken.outputs == 4000
    assert taken.largest == 12_000
    assert taken.temporary == 20_000
    assert taken.peak == 20_000


@one_ffn
def test_cell(tiny: str) -> None:
    cell = {"model": tiny, "arm": "hf", "k": None, "direction": "forward", "dtype": "fp32"}
    sizes = {"batch": 2, "length": 64, "bottleneck": 8, "threads": 1}
    dense = memory.measure({**cell, **sizes})
    plugged = memory.measure({**cell, **sizes, "arm": "reference", "k": 4})
    for row in (dense, plugged):
        assert row["status"] == "ok", row
        assert row["output_bytes"] == 2 * 64 * 64 * 4
        assert row["peak_bytes"] >= row["largest_bytes"] > 0


@one_ffn
def test_writes_json(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "in_child", lambda cell: memory.measure(cell))
    monkeypatch.setattr(memory, "PLUGGED", ("reference",))
    arguments = ["--model", tiny, "--quick", "--dtype", "fp32", "--output", str(tmp_path)]
    assert memory.main(arguments) == 0
    content = json.loads((tmp_path / "memory.json").read_text())
    assert content["benchmark"] == "memory"
    assert {(row["arm"], row["direction"]) for row in content["rows"]} == {
        ("hf", "forward"),
        ("dense-packed", "forward"),
        ("reference", "forward"),
        ("hf", "backward"),
        ("reference", "backward"),
    }


@one_ffn
def test_child_process(tiny: str) -> None:
    row = memory.in_child({"model": tiny, "arm": "none of them"})
    assert row["status"] == "failed" and "KeyError" in row["reason"]
    assert machine.slug() == machine.slug().lower()
