"""The command that measures dtypes against fp32."""

import json

import pytest
import torch

from bench import dtypes
from bench.cases import models
from tests.bench.conftest import one_ffn

QUICK = ("--quick", "--rounds", "3")


@one_ffn
def test_every_case_is_measured_and_checked(tiny, tmp_path):
    assert dtypes.main(["--model", tiny, *QUICK, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "dtypes.json").read_text())["rows"]
    assert [(row["case"], row["arm"]) for row in rows] == [
        (case, arm)
        for case in dtypes.CASES
        for arm in (dtypes.INFERENCE if case == "inference" else dtypes.ARMS)
    ]
    for row in rows:
        assert row["status"] == "ok" and row["error"] <= row["allowed"]
        assert row["over_fp32"]["median"] > 0
        for dtype in ("fp32", "bf16"):
            assert row["arm"] != dtype or row[f"over_{dtype}"]["median"] == 1


@one_ffn
def test_a_wrong_output_has_no_number(tiny, tmp_path, monkeypatch):
    real = dtypes.Work.call

    def wrong(self, case, arm, module, x):
        out = real(self, case, arm, module, x)
        broken = arm == "bf16" and module.backend == "auto" and case == "inference"
        return (out[0] + 1, *out[1:]) if broken else out

    monkeypatch.setattr(dtypes.Work, "call", wrong)
    assert dtypes.main(["--model", tiny, *QUICK, "--output", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "dtypes.json").read_text())["rows"]
    (bad,) = [row for row in rows if row["status"] != "ok"]
    assert (bad["case"], bad["arm"]) == ("inference", "bf16") and "samples" not in bad


@pytest.mark.parametrize(
    ("arm", "dtype"),
    # T5 keeps wo in fp32 for fp16, and the sublayer's output takes the wider of the two.
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float32),
     ("autocast", torch.float32)],
)  # fmt: skip
def test_outputs_have_the_dtype_of_the_arm(arm, dtype):
    work = dtypes.Work(models.architecture("t5-base"), 1, 8)
    (y,) = work.build("inference", arm)()
    assert y.dtype == dtype
