"""The GPU report's way from sublayers to JSON and PNG, at toy sizes on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from bench import gpu_report
from bench.common import checks
from bench.gpu import cases, verdicts
from tests.ops.cases import CUDA


def test_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    assert gpu_report.main(["--dry-run", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert report["dry_run"] and report["machine"]["gpu"] is None and not report["not_measured"]
    assert {row["status"] for row in report["rows"]} == {"ok"}
    measured = {(row["name"], row["model"], row["arm"]) for row in report["rows"]}
    assert ("curve", "t5-base", "ours") in measured and ("sizes", "llama-7b", "hf") in measured
    ours = [row for row in report["rows"] if row["arm"] == "ours" and not row["backward"]]
    assert all(row["over_floor"] > 0 and row["speedup"]["reference"] for row in ours)
    assert (tmp_path / "gpu_report.png").stat().st_size > 10_000
    assert "proven.json" not in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_report.main(["--output", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_wrong_kernel_gets_no_number(monkeypatch):
    from bench.gpu import measure
    from bench.gpu.clock import Clock

    case = cases.Case("target", "t5-base", 1, 8, (4,), ("reference", "ours"))
    plugged = measure.Arms.plugged

    def off_by_a_little(self, backend, x, *rest):
        call = plugged(self, "reference", x, *rest)
        return (lambda: (call()[0] + 0.1,)) if backend == "triton" else call

    monkeypatch.setattr(measure.Arms, "plugged", off_by_a_little)
    model = measure.MODELS["t5-base"]._replace(d=32, f=48)
    ceilings = {"copy": 1e9, "matrix": 1e9}
    reference, ours = measure.measure(
        case, Clock("cpu"), ceilings, rounds=1, kernels="triton", model=model
    )
    assert ours["status"] == "failed" and "seconds" not in ours and "speedup" not in ours
    assert reference["status"] == "ok"


def test_verdicts_name_what_was_not_measured():
    row = {"name": "target", "arm": "ours", "model": "t5-base", "batch": 1, "length": 8, "k": 4,
           "speedup": {"hf": {"median": 3.0}}, "over_floor": 1.2}  # fmt: skip
    found = {v["arm"]: v for v in verdicts.verdicts([row])}
    assert found["hf"]["met"] is False and found["floor"]["met"] is True
    assert found["hf-compiled"]["value"] is None and found["hf-compiled"]["met"] is None


@pytest.mark.skipif(not CUDA.usable or torch.cuda.is_available(), reason="needs the emulation")
def test_the_cuda_kernels_are_measured_beside():
    from bench.gpu import kernels, measure
    from bench.gpu.clock import Clock

    case = cases.Case("small", "t5-base", 1, 8, (4,), ("reference",)).with_cuda()
    options = {"rounds": 1, "model": measure.MODELS["t5-base"]._replace(d=32, f=48)}
    ceilings = {"copy": 1e9, "matrix": 1e9}
    rows = measure.measure(case, Clock("cpu"), ceilings, kernels="reference", **options)
    assert [(row["arm"], row["status"]) for row in rows] == [
        ("reference", "ok"), ("cuda", "ok"), ("cuda-launches", "ok")
    ]  # fmt: skip
    found = {v["arm"] for v in verdicts.verdicts(rows) if v["value"] is not None}
    assert found == {"cuda-launches"}
    alone = kernels.measure_kernels(
        Clock("cpu"), ceilings, backends=("cuda",), batch=1, length=16, **options
    )
    assert {row["status"] for row in alone} == {"ok"}
    assert {"group_merge_backward", "product out"} < {row["kernel"] for row in alone}


def test_the_cuda_kernels_get_no_wider_bound():
    assert checks.factor_of("cuda") == checks.factor_of("cuda-launches") == checks.FACTOR
