"""What a GPU report comes to: green or not, without what, and the rows of proven.json."""

from __future__ import annotations

import json

import pytest
import torch

from bench import gpu
from bench.cases.kernels import OF
from bench.tools.gpu_report import conclusion, session
from variator_kernels import backends

SECONDS = {128: (1, 2), 512: (2, 1), 1024: (3, 2), 2048: (3, 4), 16384: (9, 9.5)}
"""Of T5-base at k=4 by tokens: of Triton and CUDA."""


def row(case, arm, job, k, median=1.0, scope="sublayer"):
    return {"case": case, "arm": arm, "scope": scope, "model": job.model, "batch": job.batch,
            "length": job.length, "k": k, "median": median, "status": "ok"}  # fmt: skip


def whole_report(names=("triton", "cuda")):
    """Every job measured on these backends."""
    rows, kernels = [], []
    for job in gpu.JOBS:
        for k in job.ratios:
            times = SECONDS.get(job.batch * job.length, (1, 1))
            if job.name == "kernels":
                kernels += [row(kernel, name, job, k, scope="kernel")
                            for name in names for kernel in OF[name]]  # fmt: skip
            elif job.name in ("attention", "products"):
                rows.append(row(job.name, "ours", job, k, scope="kernel"))
            else:
                arms = dict(zip(("triton", "cuda"), ("ours", "cuda"), strict=True))
                seconds = dict(zip(arms, times, strict=True))
                rows += [row(job.name, arms[name], job, k, seconds[name]) for name in names]
    return {
        "rows": rows, "kernels": kernels, "not_measured": [], "steps": [], "dry_run": False,
        "machine": {"arch": "sm_90", "gpu": "some GPU", "cuda": "13.0"},
        "versions": {"torch": "2.13.0", "triton": "3.6.0"}, "commit": "0123abc",
    }  # fmt: skip


def proofs(report, names=("cuda", "triton")):
    return [json.loads(line) for line in conclusion.proofs(report, list(names))]


def won(rows):
    return [(row["backend"], row.get("from_tokens", 0)) for row in rows]


def test_a_proof_row_wherever_another_backend_becomes_the_fastest():
    report = whole_report()
    rows = proofs(report)
    assert won(rows) == [("triton", 0), ("cuda", 512), ("triton", 2048)]
    assert rows[0] == {"backend": "triton", "arch": "sm_90", "gpu": "some GPU",
                       "commit": "0123abc", "torch": "2.13.0", "triton": "3.6.0"}  # fmt: skip
    for other in report["rows"]:  # another model, ratio or job says nothing
        where = (other["model"], other["k"])
        if where != ("t5-base", 4) or other["case"] in ("target", "backward"):
            other["median"] = 1e-6 if other["arm"] == "cuda" else 1.0
    assert proofs(report) == rows


def test_what_wins_nowhere_is_what_auto_falls_back_to():
    report = whole_report()
    for found in report["rows"]:
        found["median"] = 1.0 if found["arm"] == "ours" else 2.0
    assert won(proofs(report)) == [("triton", 0), ("cuda", 0)]
    assert won(proofs(report, ["cuda"])) == [("cuda", 0)]


def test_auto_takes_what_the_report_says():
    rows = proofs(whole_report())
    for tokens, (triton, cuda) in SECONDS.items():
        fastest = "triton" if triton < cuda else "cuda"
        assert backends._in_order(rows, torch.empty(1, tokens, 8))[0] == fastest, tokens


@pytest.mark.parametrize("name", conclusion.NEEDED)
def test_a_backend_is_proven_by_all_its_jobs(capsys, name):
    report = whole_report()
    part = "kernels" if name == "kernels" else "rows"
    cuda = [r for r in report[part] if r["arm"] == "cuda"]
    lost = next(r for r in reversed(cuda) if name == "kernels" or r["case"] == name)
    report[part].remove(lost)
    assert conclusion.concluded(report, prepared=True) == 0
    out = capsys.readouterr().out
    table = f"kernels {lost['case']}" if name == "kernels" else name
    what = f"{table} {lost['model']} {lost['batch']} x {lost['length']} k={lost['k']}"
    assert f"no proof of cuda, not measured: {what}\n" in out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert won(rows) == [("triton", 0)]


def test_attention_and_products_prove_nothing(capsys):
    report = whole_report()
    report["rows"] = [r for r in report["rows"] if r["scope"] == "kernel"]
    report["kernels"] = []
    assert conclusion.concluded(report, prepared=True) == 0
    assert capsys.readouterr().out == "all green\n"


def test_a_late_job_leaves_no_proof(capsys):
    """The report is green all the same."""
    report = whole_report(["triton"])
    late = next(job for job in reversed(gpu.JOBS) if job.name == "kernels")
    report["not_measured"] = session.unmeasured(late, session.TIME_UP)["not_measured"]
    report["kernels"] = [r for r in report["kernels"] if r["model"] != late.model]
    assert conclusion.concluded(report, prepared=True) == 0
    out = capsys.readouterr().out
    assert "no time was left for kernels llama-7b 8 x 2048" in out
    assert "not measured: kernels group_merge llama-7b 8 x 2048 k=4" in out and "{" not in out
    assert "all green" in out and "no proof of cuda" not in out


def test_without_a_step_that_is_not_required_it_is_not_all_green(capsys):
    report = whole_report(["triton"])
    step = {"step": "CUDA kernels", "code": 1, "required": False, "output": "nvcc was not found"}
    report["steps"] = [step, {"step": "install", "code": 0, "required": True, "output": ""}]
    assert conclusion.concluded(report, prepared=True) == 0
    out = capsys.readouterr().out
    assert "green, without: CUDA kernels; to let 'auto' pick it" in out and "all green" not in out
    assert "without CUDA kernels: nvcc was not found" in out
    assert [json.loads(line)["backend"] for line in out.splitlines() if line[0] == "{"] == [
        "triton"
    ]
    report["steps"] = []
    assert conclusion.concluded(report, prepared=True) == 0
    assert "all green; to let 'auto' pick it" in capsys.readouterr().out


def test_without_tests_there_is_no_proof(capsys):
    assert conclusion.concluded(whole_report(), prepared=False) == 0
    assert "proven.json" not in capsys.readouterr().out


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("skipped", 0), ("ok", 0)])
def test_what_is_skipped_did_not_fail(status, code):
    report = whole_report()
    report["rows"].append({**report["rows"][0], "case": "products in", "arm": "fp8"})
    report["rows"][-1].update(status=status, scope="kernel")
    assert conclusion.concluded(report, prepared=True) == code


def test_what_came_too_late_is_told_and_is_no_failure():
    late = session.unmeasured(gpu.JOBS[-1], session.TIME_UP)["not_measured"]
    lost = [session.unmeasured(gpu.JOBS[0], why)["not_measured"][0]
            for why in ("its process ended with code -6", session.UNFINISHED)]  # fmt: skip
    assert conclusion.late_and_lost([*late, *lost]) == (
        ["target llama-7b 8 x 2048"],
        ["target t5-base 32 x 512"] * 2,
    )


def test_every_kernel_of_a_backend_is_wanted():
    report = whole_report()
    assert conclusion.missing(report, "cuda") == conclusion.missing(report, "triton") == []
    lost = [r for r in report["kernels"] if r["case"] == "adapter_decompress_backward"]
    report["kernels"] = [r for r in report["kernels"] if r not in lost or r["arm"] == "triton"]
    found = conclusion.missing(report, "cuda")
    assert found and all(name.startswith("kernels adapter_decompress_backward") for name in found)
    assert conclusion.missing(report, "triton") == []
