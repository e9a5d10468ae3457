"""bench.training_speed: numbers with a green check, and none without."""

import json

import pytest

from bench import training_speed
from variator_kernels.ratio import states

pytestmark = pytest.mark.filterwarnings("ignore")


def run(model, folder):
    options = ["--model", model, "--quick", "--dtype", "fp32,bf16", "--output", str(folder)]
    code = training_speed.main(options)
    return code, json.loads((folder / "training_speed.json").read_text())["rows"]


def test_measures_both_arms(tiny, tmp_path):
    code, rows = run(tiny, tmp_path)
    assert code == 0 and [row["arm"] for row in rows] == 2 * ["reference", "ours"]
    assert [row["dtype"] for row in rows] == ["fp32", "fp32", "bf16", "bf16"]
    for row in rows:
        assert row["error"] <= row["allowed"] and row["peak_bytes"] > 0
        assert row["seconds"]["median"] > 0
    assert rows[0]["over_reference"]["median"] == 1


def test_a_wrong_gradient_has_no_number(tiny, tmp_path, monkeypatch):
    real = training_speed.Arm.gradients

    def wrong(self):
        loss, *rest = real(self)
        ours = states(self.model)[0].backend == "auto"
        return loss * (1.01 if ours else 1.0), *rest

    monkeypatch.setattr(training_speed.Arm, "gradients", wrong)
    code, rows = run(tiny, tmp_path)
    assert code == 1 and [row["status"] for row in rows] == 2 * ["ok", "failed"]
    assert "seconds" not in rows[1]
