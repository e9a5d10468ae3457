"""The GPU report, unattended: ``make gpu-report`` or ``python -m bench.gpu_report``.

Installs the package, runs the GPU tests, measures the cases of ``bench/gpu/cases.py`` and writes
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
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "variator-kernels")
# Each in a process of its own, because most of their time is compilation: path and pytest's -k.
TESTS = [
    ("tests/gpu", "real_sizes"),
    ("tests/gpu", "not real_sizes"),
    ("tests/cuda", ""),
    ("tests/ops/test_registration.py", ""),
    ("tests/ops/test_robustness.py", ""),
]
for _path in ("tests/ops/test_forward.py", "tests/ops/test_backward.py"):
    TESTS += [
        (_path, "bfloat16"),
        (_path, "float16 and not bfloat16"),
        (_path, "every_ratio or many or large"),
        (_path, "not float16 and not every_ratio and not many and not large"),
    ]
RATIOS = (2, 4, 8, 16, 32)
# Seconds after which tests are stopped and no further case is started.
TESTS_END, MEASURE_END = 270, 490


def command(name: str, arguments: list[str], limit: float) -> dict[str, Any]:
    """Runs a step; its outcome and the end of its output."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            arguments, cwd=ROOT, capture_output=True, text=True, timeout=max(limit, 1), check=False
        )
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, output = 124, str(error)
    except OSError as error:
        code, output = 127, str(error)
    seconds = round(time.monotonic() - start, 1)
    return {"step": name, "code": code, "seconds": seconds, "output": output[-4000:]}


def prepare(began: float, arch: str) -> list[dict[str, Any]]:
    """Install, tests and compilation, beside each other: none of them is timed."""
    python, left = sys.executable, TESTS_END - (time.monotonic() - began)
    steps = []
    from build_backend import find_nvcc  # it needs setuptools, as building does

    if find_nvcc():
        # The tests run from this checkout, so its own folder needs the extension, and first.
        inplace = [python, "setup.py", "build_ext", "--inplace"]
        steps.append(command("CUDA kernels", inplace, left))
        left = TESTS_END - (time.monotonic() - began)
    pip = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
    compiling = [python, "-m", "bench.compile_triton", "--arch", arch, "--dtype", "bf16"]
    with ThreadPoolExecutor(os.cpu_count() or 4) as pool:
        jobs = [pool.submit(command, "install", pip, left)]
        # What the measurements will launch comes from Triton's cache then.
        for k in RATIOS if arch in ("sm_80", "sm_90") else ():
            output = ["--ratio", str(k), "--output", str(ROOT / "build" / f"compiled-{k}")]
            jobs.append(pool.submit(command, f"compile k={k}", [*compiling, *output], left))
        for path, selected in TESTS:
            test = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", path]
            test += ["-k", selected] if selected else []
            jobs.append(pool.submit(command, f"{path} {selected}".strip(), test, left))
        return steps + [job.result() for job in jobs]


def describe(dry: bool) -> dict[str, Any]:
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
    commit = git["output"].strip() if git["code"] == 0 else None
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {"machine": machine, "versions": versions, "commit": commit, "date": date}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--skip-preparation", action="store_true", help="only measure")
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
    # Imported late: an import must not fail before there is a report to say so.
    from bench.gpu import plot, verdicts
    from bench.gpu.cases import CASES
    from bench.gpu.clock import Clock
    from bench.gpu.kernels import measure_kernels
    from bench.gpu.kernels import text as kernels_text
    from bench.gpu.measure import measure
    from variator_kernels import backends

    report: dict[str, Any] = {
        "benchmark": "gpu_report",
        "dry_run": dry,
        **describe(dry),
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
        report["steps"] = prepare(began, report["machine"]["arch"])
        for step in report["steps"]:
            print(f"{step['step']}: exit {step['code']} after {step['seconds']} s", flush=True)
        write()
    clock = Clock("cpu" if dry else "cuda")
    report["ceilings"] = clock.ceilings()
    usable = tuple(s.name for s in backends.status() if s.usable and s.name in ("triton", "cuda"))
    kernels = "triton" if "triton" in usable else "reference"
    options: dict[str, Any] = {"rounds": 1 if dry else chosen.rounds, "kernels": kernels}
    for case in CASES:
        if time.monotonic() - began > MEASURE_END:
            report["not_measured"].append({**case._asdict(), "reason": "the time was up"})
            continue
        if "cuda" in usable:
            case = case.with_cuda()
        if dry:
            case, options["model"] = _toy(case)
        print(f"measuring {case.name} {case.model} {case.batch} x {case.length}", flush=True)
        try:
            report["rows"] += measure(case, clock, report["ceilings"], **options)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:500]
            report["not_measured"].append({**case._asdict(), "reason": reason})
        write()
    sizes = {"model": options.get("model"), "rounds": options["rounds"], "backends": usable}
    for batch, length in ((1, 16),) if dry else ((32, 512), (1, 512)):
        try:
            report["kernels"] += measure_kernels(
                clock, report["ceilings"], batch=batch, length=length, **sizes
            )
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:500]
            report["not_measured"].append({"name": "kernels", "reason": reason})
    report["verdicts"] = verdicts.verdicts(report["rows"])
    write()
    picture = plot.draw(report, path.with_suffix(".png"))
    print(verdicts.text(report))
    print(kernels_text(report["kernels"]))
    print(f"written: {path} {picture} ({report['seconds']} s)")
    failed = [step["step"] for step in report["steps"] if step["code"]]
    failed += [row["arm"] for row in report["rows"] if row["status"] != "ok"]
    failed += [row["kernel"] for row in report["kernels"] if row["status"] != "ok"]
    if failed or report["not_measured"]:
        print(f"incomplete: {failed}, {len(report['not_measured'])} cases not measured")
        return 1
    if not dry:
        print(f"all green; to let 'auto' pick it, add to proven.json: {_proof(report)}")
    return 0


def _toy(case: Any) -> tuple[Any, Any]:
    """The case at a size that the interpreter can take, without compilers."""
    from bench.gpu.sublayers import MODELS

    arms = tuple(arm for arm in case.arms if not arm.endswith("-compiled"))
    case = case._replace(batch=1, length=16, ratios=case.ratios[:1], arms=arms)
    return case, MODELS[case.model]._replace(d=32, f=48)


def _proof(report: dict[str, Any]) -> str:
    row = {"arch": report["machine"]["arch"], "gpu": report["machine"]["gpu"]}
    return json.dumps({**row, **report["versions"], "commit": report["commit"]})


if __name__ == "__main__":
    sys.exit(main())
