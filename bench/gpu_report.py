"""The GPU report, unattended: ``make gpu-report`` or ``python -m bench.gpu_report``.

Installs the package, runs the GPU tests, measures the jobs of ``bench/gpu/cases.py`` and writes
``gpu_report.json`` (after every step, so that an interrupted run keeps what it has) and a PNG.
Needs PyTorch for CUDA, Triton, transformers, pytest and matplotlib; no network. ``--dry-run`` goes
the same way at toy sizes without a GPU, on Triton's interpreter or else plain PyTorch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu.steps import CACHE, ROOT, command, prepare

PACKAGES = ("torch", "triton", "transformers", "variator-kernels")
# Seconds after the start: tests end, no job starts that would end later, the last is stopped.
TESTS_END, MEASURE_END, END = 270, 500, 520


def describe(dry: bool, commit: str | None = None) -> dict[str, Any]:
    """Where the numbers come from."""
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    git = command("git", ["git", "rev-parse", "HEAD"], 10)
    machine: dict[str, Any] = {"gpu": None, "arch": None}
    if torch.cuda.is_available() and not dry:
        properties = torch.cuda.get_device_properties(0)
        machine = {
            "gpu": properties.name,
            "arch": f"sm_{properties.major}{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30),
            "cuda": torch.version.cuda,
        }
    commit = commit or (git["output"].strip() if git["code"] == 0 else None)
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {"machine": machine, "versions": versions, "commit": commit, "date": date}


def measured(dry: bool, rounds: int, began: float) -> Iterator[dict[str, Any]]:
    """The outcome of each job; on a GPU from a process of its own."""
    from bench.gpu import session
    from bench.gpu.cases import JOBS

    if dry:
        return session.outcomes(JOBS, "cpu", rounds=1, until=began + MEASURE_END, dry=True)

    def process(first: int, path: Path) -> list[str]:
        left = MEASURE_END - (time.monotonic() - began)
        options = ["--first", str(first), "--seconds", str(left), "--rounds", str(rounds)]
        return [sys.executable, "-m", "bench.gpu.session", *options, "--output", str(path)]

    return session.followed(JOBS, process, CACHE, began + END)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--skip-preparation", action="store_true", help="only measure")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, no GPU")
    chosen = parser.parse_args(arguments)
    began = time.monotonic()
    dry = chosen.dry_run
    if dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if not dry and not torch.cuda.is_available():
        print("no GPU: PyTorch sees none (--dry-run shows that the report itself works)")
        return 2
    if not dry:
        shutil.rmtree(CACHE, ignore_errors=True)
        os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE / "inductor")
    from bench.gpu import kernels, plot, verdicts
    from variator_kernels import backends

    report: dict[str, Any] = {
        "benchmark": "gpu_report",
        "dry_run": dry,
        **describe(dry, chosen.commit),
        "backends": [status._asdict() for status in backends.status()],
        "steps": [],
        "rows": [],
        "kernels": [],
        "not_measured": [],
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    path = chosen.output / "gpu_report.json"

    def write() -> None:
        report["seconds"] = round(time.monotonic() - began, 1)
        path.write_text(json.dumps(report, indent=1) + "\n")

    if not (dry or chosen.skip_preparation):
        report["steps"] = prepare(began + TESTS_END, report["machine"]["arch"])
        for step in report["steps"]:
            print(f"{step['step']}: exit {step['code']} after {step['seconds']} s", flush=True)
        write()
    for outcome in measured(dry, chosen.rounds, began):
        if "ceilings" in outcome:
            report.setdefault("ceilings", outcome["ceilings"])
        for part in ("rows", "kernels", "not_measured"):
            report[part] += outcome.get(part, [])
        write()
    report["verdicts"] = verdicts.verdicts(report["rows"])
    write()
    print(verdicts.text(report))
    print(kernels.text(report["kernels"]))
    picture = plot.draw(report, path.with_suffix(".png"))
    print(f"written: {path} {picture} ({report['seconds']} s)")
    failed = [step["step"] for step in report["steps"] if step["code"] and step["required"]]
    failed += [row["arm"] for row in report["rows"] if row["status"] != "ok"]
    failed += [row["kernel"] for row in report["kernels"] if row["status"] != "ok"]
    if failed or report["not_measured"]:
        print(f"incomplete: {failed}, {len(report['not_measured'])} cases not measured")
        return 1
    if chosen.skip_preparation and not dry:
        print("measured; 'auto' picks it only after a report with its tests")
    elif not dry:
        print(
            "all green; to let 'auto' pick it, add to proven.json (the faster first):",
            *_proofs(report),
            sep="\n",
        )
    return 0


def _proofs(report: dict[str, Any]) -> list[str]:
    """The row of proven.json for each backend that was measured."""
    arms = {row["arm"] for row in report["rows"]}
    machine = {name: report["machine"][name] for name in ("arch", "gpu")}
    return [
        json.dumps(
            {"backend": backend, **machine, **report["versions"], "commit": report["commit"]}
        )
        for backend, arm in (("cuda", "cuda"), ("triton", "ours"))
        if arm in arms
    ]


if __name__ == "__main__":
    sys.exit(main())
