"""What packed weights cost: every cell is judged before it has a number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import packing
from tests.bench.conftest import one_ffn
from variator_kernels.ops.packed import PackCache


@one_ffn
def test_writes_json(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "in_child", lambda cell: packing.CELLS[cell["case"]](cell))
    monkeypatch.setattr(packing, "SIZES", ((2, 64),))
    monkeypatch.setattr(packing, "LONGEST", 64)
    arguments = ["--model", tiny, "--dtype", "fp32", "--rounds", "3", "--lengths", "40"]
    assert packing.main([*arguments, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "packing.json").read_text())["rows"]
    looked = {row["arm"]: row for row in rows if row["case"] == "looking"}
    assert set(looked) == set(packing.RULES)
    assert looked["read"]["status"] == looked["frozen"]["status"] == "ok"
    assert looked["read"]["over"]["median"] > 0
    memory = {row["case"]: row for row in rows if row["case"] in packing.CELLS}
    assert all(row["status"] == "ok" for row in memory.values()) and len(memory) == 2
    assert memory["unpatched"]["packed"] > 0


@one_ffn
def test_a_rule_that_misses_a_write_has_no_number(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PackCache.get
    seen: dict = {}

    def stale(self: PackCache, sources: tuple, kind: object, make: object) -> object:
        key = (tuple(map(id, sources)), kind)
        return seen.setdefault(key, real(self, sources, kind, make))

    monkeypatch.setattr(PackCache, "get", stale)
    monkeypatch.setattr(packing, "SIZES", ((2, 64),))
    monkeypatch.setattr(packing, "CELLS", {})
    arguments = ["--model", tiny, "--dtype", "fp32", "--rounds", "3", "--output", str(tmp_path)]
    assert packing.main(arguments) == 1
    rows = json.loads((tmp_path / "packing.json").read_text())["rows"]
    failed = {row["arm"]: row["reason"] for row in rows if row["status"] == "failed"}
    assert failed["read"] == "a write was missed"


@one_ffn
def test_memory_does_not_grow_with_the_lengths_met(tiny: str) -> None:
    """In a process of its own; a product of each number of rows would take a MiB and more."""
    cell = {"case": "lengths", "model": tiny, "dtype": "fp32", "k": 4, "threads": 2}
    row = packing.in_child({**cell, "lengths": 600})
    assert row["status"] == "ok", row
    assert row["bytes"] < packing.MEMORY_TARGET * 2**20
