"""The GPU report, unattended: ``make gpu-report`` or ``python -m bench.tools.gpu_report``.

Installs the package, runs the GPU tests, measures the jobs of ``bench/gpu.py`` and writes
``gpu_report.json`` (after every step, so that an interrupted run keeps what it has) and a PNG.
Needs PyTorch for CUDA, Triton, transformers, pytest and matplotlib; no network. ``--dry-run`` goes
the same way at toy sizes without a GPU, on Triton's interpreter or else plain PyTorch.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.harness import machine, options, results
from bench.tools.gpu_report.steps import CACHE, prepare

# Seconds after the start: tests end, no job starts that would end later, the last is stopped.
TESTS_END, MEASURE_END, END = 270, 500, 520


def describe(dry: bool, commit: str | None = None) -> dict[str, Any]:
    """Where the numbers come from."""
    import torch

    found: dict[str, Any] = {"gpu": None, "arch": None}
    if torch.cuda.is_available() and not dry:
        properties = torch.cuda.get_device_properties(0)
        found = {
            "gpu": properties.name,
            "arch": f"sm_{properties.major}{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30),
            "cuda": torch.version.cuda,
        }
    commit = commit or machine.commit()["commit"]
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {"machine": found, "versions": machine.versions(), "commit": commit, "date": date}


def measured(dry: bool, rounds: int, began: float) -> Iterator[dict[str, Any]]:
    """The outcome of each job; on a GPU from a process of its own."""
    from bench.gpu import JOBS
    from bench.tools.gpu_report import session

    if dry:
        return session.outcomes(JOBS, "cpu", rounds=1, until=began + MEASURE_END, dry=True)

    def process(first: int, path: Path) -> list[str]:
        # The clock is the machine's: what the process takes to start counts.
        until = str(began + MEASURE_END)
        options = ["--first", str(first), "--until", until, "--rounds", str(rounds)]
        return [
            sys.executable,
            "-m",
            "bench.tools.gpu_report.session",
            *options,
            "--output",
            str(path),
        ]

    return session.followed(JOBS, process, CACHE, began + END)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=machine.RESULTS / "gpu")
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
    from bench import gpu, plot, predictions
    from bench.tools.gpu_report.conclusion import concluded
    from variator_kernels import backends

    report: dict[str, Any] = {
        "benchmark": "gpu_report",
        "schema": results.SCHEMA,
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
        results.write(path, report)

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
    report["predictions"] = predictions.compared(report["kernels"], report["machine"]["gpu"])
    report["verdicts"] = gpu.verdicts(report["rows"], report["kernels"], report["predictions"])
    write()
    options.screen().print(*gpu.shown(report))
    picture = plot.draw(report, path)
    print(f"written: {path} {picture} ({report['seconds']} s)")
    return concluded(report, not chosen.skip_preparation)


if __name__ == "__main__":
    sys.exit(main())
