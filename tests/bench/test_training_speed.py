"""bench.training_speed: numbers with a green check, and none without."""

import json

import pytest

from bench import internals, training_speed
from tests.bench.conftest import one_ffn

pytestmark = pytest.mark.filterwarnings("ignore")


def run(model, folder):
    options = ["--model", model, "--quick", "--dtype", "fp32,bf16", "--output", str(folder)]
    code = training_speed.main(options)
    return code, json.loads((folder / "training_speed.json").read_text())["rows"]


def test_measures_both_arms(tiny, tmp_path):
    code, rows = run(tiny, tmp_path)
    assert code == 0 and [row["arm"] for row in rows] == 2 * list(training_speed.ARMS)
    assert [row["dtype"] for row in rows] == 3 * ["fp32"] + 3 * ["bf16"]
    for row in rows:
        assert row["error"] <= row["allowed"] and row["peak_bytes"] > 0
        assert row["seconds"]["median"] > 0
        # The tiny model has no weight that is large enough to be packed.
        assert row["packed_bytes"] == 0
    assert rows[0]["over_reference"]["median"] == 1


@one_ffn
def test_dtypes_that_training_does_not_take_are_refused(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        training_speed.main(["--model", tiny, "--dtype", "fp16", "--output", str(tmp_path)])
    assert "dtype must be of ('fp32', 'bf16'), got 'fp16'" in capsys.readouterr().err


@one_ffn
def test_a_wrong_gradient_has_no_number(tiny, tmp_path, monkeypatch):
    real = training_speed.Arm.gradients

    def wrong(self):
        loss, *rest = real(self)
        ours = internals.backend(self.model) == "auto"
        return loss * (2 if ours else 1), *rest

    monkeypatch.setattr(training_speed.Arm, "gradients", wrong)
    code, rows = run(tiny, tmp_path)
    assert code == 1 and [row["status"] for row in rows] == 2 * ["ok", "failed", "failed"]
    assert not any("seconds" in row for row in rows if row["status"] == "failed")
