"""bench.attention: every arm is checked, and what a cell takes is measured apart."""

from pathlib import Path

import pytest
import torch

from bench import attention
from bench.cases import attention as cases
from bench.harness import results
from bench.tools import report_parts, report_speed


def test_writes_times_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "in_child", attention.memory)
    arguments = ["--quick", "--dtype", "fp32", "--ratios", "1,3"]
    assert attention.main([*arguments, "--output", str(tmp_path)]) == 0
    content = results.read(tmp_path / "attention.json")
    found = [(row["case"], row["k"], row["arm"]) for row in content["rows"]]
    assert found == [(t, k, a) for t in attention.TERMS for k in (1, 3) for a in cases.ARMS]
    for row in content["rows"]:
        assert row["status"] == "ok" and row["speedup"]["hf-sdpa"]["median"] > 0, row
        assert row["error"] <= row["allowed"]
        if row["arm"] == "ours":
            assert row["largest_bytes"] <= row["output_bytes"], "an array of queries by keys"
    machine = report_speed.Machine(tmp_path, {"attention": content})
    table = report_parts.of_attention(machine, tmp_path)
    assert table.count("| SDPA |") == 4 and "| 2 x 40 |" in table


@pytest.mark.parametrize("terms", attention.TERMS)
def test_a_wrong_arm_has_no_number(terms, tmp_path: Path, monkeypatch, capsys) -> None:
    right = cases.grouped_attention

    def wrong(*inputs: torch.Tensor, **options: object) -> torch.Tensor:
        out = right(*inputs, **options)
        return out if options["backend"] == "reference" else out + 1e-3

    monkeypatch.setattr(cases, "grouped_attention", wrong)
    monkeypatch.setattr(attention, "in_child", lambda cell: {"grown_bytes": 0, "largest_bytes": 0})
    monkeypatch.setattr(attention, "TERMS", (terms,))
    assert attention.main(["--quick", "--dtype", "fp32", "--output", str(tmp_path)]) == 1
    rows = results.read(tmp_path / "attention.json")["rows"]
    assert [row["status"] for row in rows] == ["ok", "failed"] * 2
    assert all("median" not in row for row in rows if row["arm"] == "ours")
