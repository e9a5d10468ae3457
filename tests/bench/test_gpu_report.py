"""The GPU report's way from sublayers to JSON and PNG, at toy sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from _pytest.mark.expression import Expression

from bench import gpu, plot
from bench.cases import products, sublayer
from bench.harness import checks
from bench.harness.clock import Graph
from bench.tools import sanitize
from bench.tools.gpu_report import __main__ as gpu_report
from bench.tools.gpu_report import session, steps
from tests.ops.cases import CUDA, TRITON


def test_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    # At toy sizes jobs differ in their table and their model alone: the first of each.
    of = {word: job for job in reversed(gpu.JOBS) for word in (job.name, job.model)}
    monkeypatch.setattr(gpu, "JOBS", tuple(job for job in gpu.JOBS if job in of.values()))
    assert gpu_report.main(["--dry-run", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert report["dry_run"] and report["machine"]["gpu"] is None and not report["not_measured"]
    # What this processor cannot multiply is no failure.
    assert all(r["status"] == "ok" or r["case"].startswith("products") for r in report["rows"])
    assert not any(row["status"] == "failed" for row in report["rows"])
    measured = {(row["case"], row["model"], row["arm"]) for row in report["rows"]}
    assert ("curve", "t5-base", "ours") in measured and ("sizes", "llama-7b", "hf") in measured
    arms = {(case, arm) for case, _, arm in measured}
    assert {("attention", arm) for arm in gpu.ATTENTION} <= arms
    assert {(f"products {way}", arm) for way in ("in", "out") for arm in products.ARMS} <= arms
    assert report["kernels"] and report["predictions"] == []
    whole = [r for r in report["rows"] if (r["scope"], r["direction"]) == ("sublayer", "forward")]
    ours = [row for row in whole if row["arm"] == "ours"]
    assert all(row["over_floor"] > 0 and row["speedup"]["reference"] for row in ours)
    assert (tmp_path / "gpu_report.png").stat().st_size > 10_000
    assert "proven.json" not in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_report.main(["--output", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


CEILINGS = {"copy": 1e9, "matrix": 1e9}


def test_a_wrong_kernel_gets_no_number(monkeypatch):
    right = sublayer.Sublayer.plugged

    def off_by_a_little(self, name, k, train=False):
        call = right(self, "reference", k, train)
        return (lambda x: call(x) + 0.1) if name == "ours" else call

    monkeypatch.setattr(sublayer.Sublayer, "plugged", off_by_a_little)
    monkeypatch.setattr(gpu, "usable", lambda: ("triton",))
    job = gpu.Job("target", "t5-base", 1, 8, (4,), ("reference", "ours"))
    reference, ours = gpu.measure(job, Graph("cpu"), CEILINGS, 1, dry=True)
    assert ours["status"] == "failed" and "median" not in ours and "speedup" not in ours
    assert reference["status"] == "ok"


JOBS = [gpu.Job("kernels", "t5-base", 1, i) for i in range(5)]
# Measures jobs 0, 1, ...; job 1 kills its process, job 3 never ends, job 2 wants a new process.
MEASURING = """
import os, sys, time
first, path = int(sys.argv[1]), sys.argv[2]
for job in range(first, 5):
    if job == 1: os.abort()
    if job == 3: time.sleep(1000)
    with open(path, "a") as file: file.write('{"rows": [%d]}\\n' % job)
    if job == 2: sys.exit(0)
"""


def measuring(first, path):
    return [sys.executable, "-c", MEASURING, str(first), str(path)]


def test_a_kernel_that_crashes_or_hangs_costs_its_job(tmp_path):
    until = time.monotonic() + 1000
    found = list(session.followed(JOBS, measuring, tmp_path, until, limits=(2, 2)))
    assert [outcome.get("rows") for outcome in found] == [[0], None, [2], None, [4]]
    reasons = [found[i]["not_measured"][0]["reason"] for i in (1, 3)]
    assert reasons == ["its process ended with code -6", "it took more than 2 s"]


def test_no_time_left(tmp_path):
    found = list(session.followed(JOBS, measuring, tmp_path, time.monotonic() - 1))
    assert [outcome["not_measured"][0]["reason"] for outcome in found] == ["the time was up"] * 5
    jobs = [job for job in gpu.JOBS if job.compiles]
    for outcome in session.outcomes(jobs, "cpu", 1, time.monotonic(), dry=True):
        assert outcome["not_measured"][0]["reason"] == "the time was up"


@pytest.mark.parametrize(
    ("line", "reason"), [("began", session.UNFINISHED), ("", "the time was up")]
)
def test_only_a_job_that_never_began_came_too_late(tmp_path, line, reason):
    """Job 0 hangs, as it begins or before."""
    write = f"open(path, 'a').write('{{\"{line}\": true}}\\n')" if line else "pass"
    code = f"import sys, time; path = sys.argv[1]; {write}; time.sleep(1000)"

    def hanging(first, path):
        return [sys.executable, "-c", code, str(path)]

    until = time.monotonic() + (3 if line else 0.5)  # long enough to start a process
    found = list(session.followed(JOBS[:2], hanging, tmp_path, until))
    reasons = [outcome["not_measured"][0]["reason"] for outcome in found]
    assert reasons == [reason, "the time was up"]


def test_the_measuring_process_says_what_began(tmp_path, monkeypatch):
    """It is given the machine's clock, so that its start counts."""
    asked = []

    def outcomes(jobs, device, rounds, until, begin):
        asked.append((jobs, device, rounds, until))
        begin()
        yield {"rows": [1]}
        yield {"not_measured": [2]}

    monkeypatch.setattr(session, "outcomes", outcomes)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    monkeypatch.setattr(session, "followed", lambda jobs, process, *_: process(3, tmp_path / "out"))
    command = gpu_report.measured(False, 7, 1000.0)
    session.main(command[command.index("bench.tools.gpu_report.session") + 1 :])
    assert asked == [(gpu.JOBS[3:], "cuda", 7, 1000.0 + gpu_report.MEASURE_END)]
    lines = (tmp_path / "out").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"began": True}, {"rows": [1]}, {"not_measured": [2]}
    ]  # fmt: skip


def test_no_job_begins_that_would_end_too_late(monkeypatch):
    """Going by those before it, and one that does not begin does not say so."""
    begun = []
    monkeypatch.setattr(gpu, "measure", lambda *_: time.sleep(0.6) or [])
    monkeypatch.setattr(Graph, "ceilings", lambda self: {})
    until = time.monotonic() + 1
    found = list(
        session.outcomes(JOBS[:3], "cpu", 1, until, dry=True, begin=lambda: begun.append(1))
    )
    assert [("not_measured" in outcome) for outcome in found] == [False, True, True]
    assert len(begun) == 1


def test_after_a_broken_context_another_process_goes_on(monkeypatch):
    monkeypatch.setattr(Graph, "works", lambda self: False)
    jobs = [job for job in gpu.JOBS if job.name == "small"]
    assert len(list(session.outcomes(jobs, "cpu", 1, time.monotonic() + 1000, dry=True))) == 1


def test_a_step_that_is_stopped_keeps_its_output_and_leaves_no_process():
    code = "import subprocess; print('so far', flush=True); subprocess.run(['sleep', '31.4159'])"
    step = steps.command("slow", [sys.executable, "-c", code], 2, required=False)
    assert step["code"] == 124 and "so far" in step["output"] and not step["required"]
    assert step["seconds"] < 20  # it would wait for the pipe of what is left


@pytest.mark.parametrize("code", [0, 1])
def test_what_needs_no_cuda_kernels_runs_beside_their_build(monkeypatch, code):
    lock, started, building = threading.Lock(), [], threading.Event()

    def build(limit):
        assert building.wait(60), "nothing ran beside the build"
        with lock:
            started.append("CUDA kernels")
        return {"step": "CUDA kernels", "code": code, "required": True, "output": ""}

    def command(name, *rest, **env):
        with lock:
            started.append(name)
        building.set()
        return {"step": name, "code": 0, "required": True, "output": ""}

    monkeypatch.setattr(steps, "command", command)
    monkeypatch.setattr(steps, "cuda_kernels", build)
    found = [step["step"] for step in steps.prepare(time.monotonic() + 100, "sm_90")]
    assert sorted(found) == sorted(started)
    behind = started[started.index("CUDA kernels") + 1 :]
    assert "install" in behind and started.index("CUDA kernels") > 0
    assert (("tests/cuda" in behind) and ("tests/gpu/test_cuda.py" in behind)) == (code == 0)
    assert "tests/gpu/test_triton.py real_sizes" in started
    assert len([name for name in started if name.startswith("compile ")]) == 4 * 5 + 6


def test_what_the_build_lacks_is_named(monkeypatch):
    outcomes = iter([(0, "setuptools>=77\nnvidia-cutlass>=4.2,<5\n"), (1, "no such wheel")])

    def command(name, arguments, limit):
        code, output = next(outcomes)
        return {"step": name, "code": code, "required": True, "output": output}

    monkeypatch.setattr(steps, "command", command)
    monkeypatch.setattr(steps, "cuda_kernels", lambda limit: pytest.fail("nothing to build with"))
    (step,) = steps.prepare(time.monotonic() + 100, "sm_90")
    assert step["code"] and step["required"]
    assert step["output"].startswith("missing: setuptools>=77, nvidia-cutlass>=4.2,<5; wheels")


def test_every_process_of_tests_has_tests():
    """pytest calls a selection of nothing an error."""
    paths = sorted({path for path, _ in (*steps.TESTS, *steps.CUDA_TESTS)} - {"tests/cuda"})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    out = subprocess.run([*command, *paths], capture_output=True, text=True, cwd=steps.ROOT)
    ids = [line for line in out.stdout.splitlines() if "::" in line]
    for path, chosen in (*steps.TESTS, *steps.CUDA_TESTS):
        if path == "tests/cuda" or not chosen:
            continue
        selected = Expression.compile(chosen).evaluate
        names = (i for i in ids if i.startswith(path))
        assert any(selected(lambda word, i=i, **_: word in i.split("::", 1)[1]) for i in names), (
            f"{path} {chosen}"
        )


def test_a_report_without_measurements_is_drawn(tmp_path):
    report = {"benchmark": "gpu_report", "rows": [], "kernels": [], "dry_run": True}
    assert plot.draw(report, tmp_path / "empty.json").stat().st_size > 1000
    (targets,) = gpu.shown(report)
    assert targets.row_count == 0


def test_a_report_ends_whatever_failed(tmp_path, monkeypatch, capsys):
    machine = {"machine": {"gpu": "some GPU", "arch": "sm_90"}, "versions": {"torch": "2"}}
    step = {"step": "install", "code": 1, "seconds": 1.0, "required": True, "output": ""}
    lost = session.unmeasured(gpu.JOBS[0], "its process ended with code -6")
    for name, value in {
        "describe": lambda *_: {**machine, "commit": None},
        "prepare": lambda *_: [step, {**step, "step": "warm", "required": False}],
        "measured": lambda *_: iter([lost, {"ceilings": {"copy": 1.0}, "rows": []}]),
        "CACHE": tmp_path / "cache",
    }.items():
        monkeypatch.setattr(gpu_report, name, value)
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("variator_kernels.backends.status", lambda: [])
    assert gpu_report.main(["--output", str(tmp_path)]) == 1
    assert "incomplete: ['install'], 1 cases not measured" in capsys.readouterr().out
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert report["ceilings"] == {"copy": 1.0} and report["not_measured"][0]["model"] == "t5-base"
    assert (tmp_path / "gpu_report.png").exists()


def test_what_takes_longest_comes_last():
    assert [job.compiles for job in gpu.JOBS[1:]] == sorted(j.compiles for j in gpu.JOBS[1:])


@pytest.mark.skipif(not TRITON.usable, reason=f"no Triton kernels: {TRITON.detail}")
def test_the_sanitizers_workload_runs(monkeypatch):
    """tests/cuda has the other backend's."""
    monkeypatch.setattr(sanitize, "SIZES", sanitize.SIZES[:1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sanitize.workload("triton", device, tokens=11)


def test_verdicts_name_what_was_not_measured():
    row = {"case": "target", "arm": "ours", "model": "t5-base", "batch": 1, "length": 8, "k": 4,
           "speedup": {"hf": {"median": 3.0}}, "over_floor": 1.2}  # fmt: skip
    found = {v["arm"]: v for v in gpu.verdicts([row])}
    assert found["hf"]["met"] is False and found["floor"]["met"] is True
    assert found["hf-compiled"]["value"] is None and found["hf-compiled"]["met"] is None


@pytest.mark.skipif(not CUDA.usable or torch.cuda.is_available(), reason="needs the emulation")
def test_the_cuda_kernels_are_measured_beside():
    job = gpu.Job("small", "t5-base", 1, 8, (4,), ("reference",))
    rows = gpu.measure(job, Graph("cpu"), CEILINGS, 1, dry=True)
    assert [(row["arm"], row["status"]) for row in rows] == [
        ("reference", "ok"), ("cuda", "ok"), ("cuda-launches", "ok"), ("cuda-one", "ok")
    ]  # fmt: skip
    found = {v["arm"] for v in gpu.verdicts(rows) if v["value"] is not None}
    assert found == {"cuda-launches"}
    alone = gpu.measure(job._replace(name="kernels"), Graph("cpu"), CEILINGS, 1, dry=True)
    cuda = [row for row in alone if row["arm"] == "cuda"]
    assert {row["status"] for row in cuda} == {"ok"}
    assert {"group_merge_backward", "product out"} < {row["case"] for row in cuda}


def test_the_cuda_kernels_get_no_wider_bound():
    assert checks.factor_of("cuda") == checks.factor_of("cuda-launches") == checks.FACTOR
