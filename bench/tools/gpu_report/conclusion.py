"""What a report comes to: green or not, and which rows of ``proven.json`` it makes."""

import json
from typing import Any

from bench import gpu
from bench.cases import kernels

from .steps import TIME_UP

Report = dict[str, Any]
ARMS = {"cuda": "cuda", "triton": "ours"}
"""A backend's arm of a sublayer."""
NEEDED = ("curve", "backward", "small", "sizes", "kernels")
"""Jobs without which there is no proof."""
SIZES = ("small", "curve", "sizes")
"""Jobs that say from how many tokens on a backend is the fastest."""
MODEL, RATIO = "t5-base", 4
"""Of which they say it."""


def concluded(report: Report, prepared: bool) -> int:
    """Prints what the report comes to; 1 if something failed. ``prepared``: with its tests."""
    failed = [step["step"] for step in report["steps"] if step["code"] and step["required"]]
    failed += [row["arm"] for row in report["rows"] if row["status"] == "failed"]
    failed += [row["case"] for row in report["kernels"] if row["status"] == "failed"]
    late, lost = late_and_lost(report["not_measured"])
    if late:  # the next run, with --skip-preparation, has time for them
        print("no time was left for", *late)
    if failed or lost or not report["rows"]:
        print(f"incomplete: {failed}, {len(lost)} cases not measured")
        return 1
    if report["dry_run"]:
        return 0
    if not prepared:
        print("measured; 'auto' picks it only after a report with its tests")
        return 0
    without = [step for step in report["steps"] if step["code"]]
    for step in without:
        print(f"without {step['step']}:", *step["output"].strip().splitlines()[-1:])
    names = ", ".join(step["step"] for step in without)
    green = f"green, without: {names}" if without else "all green"
    lacking = {backend: missing(report, backend) for backend in measured(report)}
    for backend, jobs in lacking.items():
        if jobs:
            print(f"no proof of {backend}, not measured:", ", ".join(jobs))
    rows = proofs(report, [backend for backend, jobs in lacking.items() if not jobs])
    if not rows:
        print(green)
        return 0
    print(
        f"{green}; to let 'auto' pick it, add to proven.json (the faster first):", *rows, sep="\n"
    )
    return 0


def late_and_lost(not_measured: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The cases that came too late, and those that went wrong."""
    made: tuple[list[str], list[str]] = ([], [])
    for job in not_measured:
        case = f"{job['name']} {job['model']} {job['batch']} x {job['length']}"
        made[job["reason"] != TIME_UP].append(case)
    return made


def measured(report: Report) -> list[str]:
    """The backends whose sublayer was measured at all."""
    arms = {row["arm"] for row in report["rows"] if row["scope"] == "sublayer"}
    return [backend for backend, arm in ARMS.items() if arm in arms]


def missing(report: Report, backend: str) -> list[str]:
    """What a proof of a backend needs and the report does not have."""
    parts = [(row["case"], ARMS[backend], row) for row in report["rows"]]
    parts += [(f"kernels {row['case']}", backend, row) for row in report["kernels"]]
    found = {
        (name, row["model"], row["batch"], row["length"], row["k"])
        for name, arm, row in parts
        if row["arm"] == arm and row["status"] == "ok"
    }
    wanted = [
        (name, job.model, job.batch, job.length, k)
        for job in gpu.JOBS
        if job.name in NEEDED
        for name in _names(job, backend)
        for k in job.ratios
    ]
    return ["{} {} {} x {} k={}".format(*each) for each in wanted if each not in found]


def _names(job: gpu.Job, backend: str) -> list[str]:
    """The tables of a job that a backend has rows in."""
    if job.name != "kernels":
        return [job.name]
    return [f"kernels {kernel}" for kernel in kernels.OF[backend]]


def proofs(report: Report, backends: list[str]) -> list[str]:
    """Rows of proven.json, one wherever another backend becomes the fastest; last those of
    backends that are nowhere, which ``auto`` falls back to."""
    times: dict[int, dict[str, float]] = {}
    for row in report["rows"]:
        if row["case"] not in SIZES or (row["model"], row["k"]) != (MODEL, RATIO):
            continue
        for backend in backends:
            if row["arm"] == ARMS[backend] and row["status"] == "ok":
                times.setdefault(row["batch"] * row["length"], {})[backend] = row["median"]
    found: list[tuple[str, int]] = []
    for tokens, by_backend in sorted(times.items()):
        fastest = min(by_backend, key=by_backend.__getitem__)
        if not found or found[-1][0] != fastest:
            found.append((fastest, tokens if found else 0))
    found += [(backend, 0) for backend in backends if backend not in dict(found)]
    where = {name: report["machine"][name] for name in ("arch", "gpu")}
    common = {**where, **report["versions"], "commit": report["commit"]}
    return [
        json.dumps({"backend": backend, **({"from_tokens": least} if least else {}), **common})
        for backend, least in found
    ]
