"""What comes before measuring: install, tests and compilation, beside each other and in time."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.gpu import JOBS, RATIOS
from bench.harness.machine import ROOT

# Compiled kernels that the steps leave to the measurements; a folder for each command's own.
CACHE = ROOT / "build" / "gpu-report"
# Each in a process of its own, because most of their time is compilation: path and pytest's -k.
TESTS = [
    ("tests/gpu", "real_sizes"),
    ("tests/gpu", "not real_sizes"),
    ("tests/cuda", ""),
    ("tests/ops/test_registration.py", ""),
    ("tests/ops/test_residual.py", ""),
    ("tests/ops/test_robustness.py", ""),
    ("tests/ops/test_triton_products.py", ""),
    ("tests/ops/test_forward.py", "every_ratio and (16 or 32)"),
    ("tests/ops/test_forward.py", "every_ratio and not 16 and not 32"),
]
for _path in ("tests/ops/test_forward.py", "tests/ops/test_backward.py"):
    TESTS += [
        (_path, "bfloat16"),
        (_path, "float16 and not bfloat16"),
        (_path, "not every_ratio and (many or large)"),
        (_path, "not float16 and not every_ratio and not many and not large"),
    ]


def stop(process: subprocess.Popen) -> None:
    """Ends a process that leads its own session, and all that it started: no compiler stays."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def command(
    name: str, arguments: list[str], limit: float, required: bool = True, **env: str
) -> dict[str, Any]:
    """Runs a step of at most ``limit`` seconds: its outcome and the end of its output.

    Without a ``required`` step the report is slower, but whole.
    """
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True, env={**os.environ, **env},
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=max(limit, 1))
            code = process.returncode
        except subprocess.TimeoutExpired:
            stop(process)
            output, code = process.communicate()[0] + f"\nstopped after {limit:.0f} s", 124
    except OSError as error:
        code, output = 127, str(error)
    seconds = round(time.monotonic() - start, 1)
    return {"step": name, "code": code, "seconds": seconds, "required": required,
            "output": output[-4000:]}  # fmt: skip


def _cuda_kernels(limit: float) -> list[dict[str, Any]]:
    """Builds them into this checkout, from which the tests run; nothing without nvcc or CUTLASS."""
    look = "import build_backend, setup; assert build_backend.find_nvcc(); setup.find_cutlass()"
    if command("", [sys.executable, "-c", look], 60)["code"]:
        return []
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return [command("CUDA kernels", build, limit)]


def prepare(until: float, arch: str) -> list[dict[str, Any]]:
    """Everything that ends by ``until`` (``time.monotonic``) and is not timed."""
    python = sys.executable
    # The tests must not be left without time.
    steps = _cuda_kernels(min(150, 0.6 * (until - time.monotonic())))
    left = until - time.monotonic()
    jobs: list[tuple[str, list[str], bool, dict[str, str]]] = []
    for path, selected in TESTS:
        test = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", path]
        test += ["-k", selected] if selected else []
        jobs.append((f"{path} {selected}".strip(), test, True, {}))
    pip = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
    jobs.append(("install", pip, True, {}))
    # What is measured later comes from the compilers' caches then.
    compiling = [python, "-m", "bench.tools.compile_triton", "--arch", arch, "--dtype", "bf16"]
    for k in RATIOS if arch in ("sm_80", "sm_90") else ():
        output = ["--ratio", str(k), "--output", str(CACHE / f"compiled-{k}")]
        jobs.append((f"compile k={k}", [*compiling, *output], True, {}))
    for model in dict.fromkeys(c.model for c in JOBS if c.compiles):
        # Its choices are made beside other work, so they are thrown away: only TRITON_CACHE_DIR
        # is shared with the measurements.
        env = {"TORCHINDUCTOR_CACHE_DIR": str(CACHE / f"warm-{model}"),
               "TORCHINDUCTOR_COMPILE_THREADS": "4"}  # fmt: skip
        warm = ["nice", "-n", "10", python, "-m", "bench.tools.gpu_report.session"]
        warm += ["--warm", model]
        jobs.append((f"max-autotune {model}", warm, False, env))
    with ThreadPoolExecutor(len(jobs)) as pool:
        started = [
            pool.submit(command, name, arguments, left, required, OMP_NUM_THREADS="2", **env)
            for name, arguments, required, env in jobs
        ]
        return steps + [job.result() for job in started]
