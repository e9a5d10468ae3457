"""What kept tokens cost: both arms are judged, and a wrong one has no number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import variator_kernels as vk
from bench import keeping
from tests.bench.conftest import one_ffn

SMALL = ["--dtype", "fp32", "--batch", "2", "--length", "33", "--ratios", "4,16", "--rounds", "3"]


@one_ffn
def test_writes_json(tmp_path: Path, tiny: str) -> None:
    assert keeping.main(["--model", tiny, *SMALL, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "keeping.json").read_text())["rows"]
    assert [(row["k"], row["kept"]) for row in rows] == [(4, 0), (4, 1), (16, 0), (16, 1)]
    assert all(row["status"] == "ok" and row["over"]["median"] > 0 for row in rows)
    merged, kept = rows[:2]  # nine groups a row, and one token beside eight
    assert merged["share"] == 0 and kept["share"] < 0 and kept["limit"] == 1.015
    assert rows[3]["limit"] == pytest.approx(1.01 + rows[3]["share"])
    assert [row["k"] for row in keeping.shown(rows)] == [4, 16]


@one_ffn
def test_an_arm_that_is_wrong_has_no_number(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = vk.functional.compressed_ffn

    def wrong(*arguments: object, backend: str, keep_first: int = 0) -> object:
        return run(*arguments, backend=backend, keep_first=keep_first if backend != "cpu" else 0)

    monkeypatch.setattr(vk.functional, "compressed_ffn", wrong)
    assert keeping.main(["--model", tiny, *SMALL, "--output", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "keeping.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "failed"] * 2
    assert not any("samples" in row for row in rows) and not keeping.shown(rows)
