"""What comes before measuring: install, tests and compilation, beside each other and in time."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from bench.gpu import JOBS, RATIOS
from bench.harness.machine import ROOT
from bench.tools.triton_cases import ATTENTIONS, MODELS

# Compiled kernels that the steps leave to the measurements; a folder for each command's own.
CACHE = ROOT / "build" / "gpu-report"
# What the build needs and the machine may lack: it comes with the tree, there is no network.
WHEELS = ROOT / "build" / "wheels"
TIME_UP = "the time was up"
# Each in a process of its own, because most of their time is compilation: path and pytest's -k.
# Those of the second list need the CUDA kernels, and start when these are built.
TESTS = [("tests/gpu/test_triton.py", "real_sizes"), ("tests/gpu/test_triton.py", "not real_sizes")]
CUDA_TESTS = [("tests/gpu/test_cuda.py", ""), ("tests/cuda", "")]
for _name in ("registration", "residual", "robustness", "triton_products"):
    TESTS.append((f"tests/ops/test_{_name}.py", ""))
_OPS = [
    ("tests/ops/test_wide_bottlenecks.py", ""),
    ("tests/ops/test_forward.py", "every_ratio and (16 or 32)"),
    ("tests/ops/test_forward.py", "every_ratio and not 16 and not 32"),
]
for _path in ("tests/ops/test_forward.py", "tests/ops/test_backward.py"):
    _OPS += [
        (_path, "bfloat16"),
        (_path, "float16 and not bfloat16"),
        (_path, "not every_ratio and (many or large)"),
        (_path, "not float16 and not every_ratio and not many and not large"),
    ]
for _path, _chosen in _OPS:
    TESTS.append((_path, f"({_chosen}) and not cuda" if _chosen else "not cuda"))
    CUDA_TESTS.append((_path, f"({_chosen}) and cuda" if _chosen else "cuda"))


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


MISSING = """
import importlib.metadata as metadata, tomllib
import build_backend
from packaging.requirements import Requirement
with open("pyproject.toml", "rb") as file:
    wanted = tomllib.load(file)["build-system"]["requires"]
for text in [*wanted, *([build_backend.CUTLASS] if build_backend.needs_cutlass() else [])]:
    wish, found = Requirement(text), None
    try:
        found = metadata.version(wish.name)
    except metadata.PackageNotFoundError:
        pass
    if found is None or not wish.specifier.contains(found, prereleases=True):
        print(text)
"""


def build_tools(limit: float) -> dict[str, Any]:
    """What the build needs in the versions it needs, setuptools and CUTLASS among them."""
    look = command("build tools", [sys.executable, "-c", MISSING], 60)
    missing = look["output"].split()
    if look["code"] or not missing:
        return look
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--find-links"]
    found = command("build tools", [*pip, str(WHEELS), *missing], limit)
    if found["code"]:
        found["output"] = (
            f"missing: {', '.join(missing)}; wheels of them are looked for in {WHEELS}\n"
        ) + found["output"]
    return found


def cuda_kernels(limit: float) -> dict[str, Any]:
    """Builds them beside this checkout and moves them into it, whole: tests run from it meanwhile.

    Without nvcc there is nothing to build, which the outcome says; anything else that keeps them
    from being built is an error.
    """
    look = "import sys, build_backend; sys.exit(build_backend.find_nvcc() is None)"
    if command("", [sys.executable, "-c", look], 60)["code"]:
        return {"step": CUDA_KERNELS, "code": 1, "seconds": 0.0, "required": False,
                "output": "nvcc was not found"}  # fmt: skip
    folder = CACHE / "built"
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)]
    step = command(CUDA_KERNELS, build, limit, VARIATOR_CUDA="1", VARIATOR_REQUIRE="cuda")
    if not step["code"]:
        for file in (folder / "variator_kernels").iterdir():
            os.replace(file, ROOT / "variator_kernels" / file.name)
    return step


CUDA_KERNELS = "CUDA kernels"
Work = tuple[str, list[str], bool, dict[str, str]]


def tests(chosen: list[tuple[str, str]]) -> Iterator[Work]:
    for path, selected in chosen:
        test = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", path]
        test += ["-k", selected] if selected else []
        yield f"{path} {selected}".strip(), test, True, {}


def compilations(arch: str) -> Iterator[Work]:
    """What is measured later comes from the compilers' caches then; a process a model and ratio."""
    python = sys.executable
    for model in dict.fromkeys(c.model for c in JOBS if c.compiles):
        # Its choices are made beside other work, so they are thrown away: only TRITON_CACHE_DIR
        # is shared with the measurements.
        env = {"TORCHINDUCTOR_CACHE_DIR": str(CACHE / f"warm-{model}"),
               "TORCHINDUCTOR_COMPILE_THREADS": "4"}  # fmt: skip
        warm = ["nice", "-n", "10", python, "-m", "bench.tools.gpu_report.session"]
        yield f"max-autotune {model}", [*warm, "--warm", model], False, env
    if arch not in ("sm_80", "sm_90"):
        return
    compiling = [python, "-m", "bench.tools.compile_triton", "--arch", arch, "--dtype", "bf16"]
    cases = [(f"{model} k={k}", ["--attention", "--model", model, "--ratio", str(k)])
             for model in MODELS for k in RATIOS]  # fmt: skip
    cases += [(f"attention {name}", ["--model", "--attention", name]) for name in ATTENTIONS]
    for place, (name, options) in enumerate(cases):
        output = ["--bottleneck", "64", "--output", str(CACHE / f"compiled-{place}")]
        yield f"compile {name}", [*compiling, *options, *output], True, {}


def prepare(until: float, arch: str) -> list[dict[str, Any]]:
    """Everything that ends by ``until`` (``time.monotonic``) and is not timed.

    The CUDA kernels' compilation takes long and few of the processors, so all that does not need
    them runs beside it.
    """

    def left() -> float:
        return until - time.monotonic()

    def run(work: Work) -> dict[str, Any]:
        name, arguments, required, env = work
        return command(name, arguments, left(), required, OMP_NUM_THREADS="2", **env)

    def after(build: Future, work: Work, always: bool = False) -> dict[str, Any] | None:
        return run(work) if not build.result()["code"] or always else None

    steps = [build_tools(left())]
    if steps[0]["code"]:
        return steps
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
    install: Work = ("install", pip, True, {})
    with ThreadPoolExecutor(max(os.cpu_count() or 1, 4)) as pool:
        # Its tests must not be left without time.
        build = pool.submit(cuda_kernels, min(180, 0.7 * left()))
        started: list[Future] = [
            pool.submit(run, work) for work in (*tests(TESTS), *compilations(arch))
        ]
        # The package's own build takes what is compiled by then.
        waiting: list[Future] = [pool.submit(after, build, install, True)]
        waiting += [pool.submit(after, build, work) for work in tests(CUDA_TESTS)]
        done = [job.result() for job in [build, *started, *waiting]]
    return steps + [step for step in done if step is not None]
