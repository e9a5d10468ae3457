"""Builds the extensions with CMake; where that cannot be done, the package is plain Python.

What was built, and why something was not, goes to stderr and to variator_kernels/_build_info.json.

VARIATOR_REQUIRE=cpu[,cuda]   a part that could not be built is an error
VARIATOR_CMAKE_ARGS="..."     more arguments for CMake
VARIATOR_SANITIZE=1           build with the address and undefined-behaviour sanitizers
VARIATOR_CUDA=1, 0, auto      build the CUDA kernels, or not; auto: where nvcc and a GPU are
MAX_JOBS=4                    compile so many files at once; CMAKE_BUILD_PARALLEL_LEVEL does too.
                              Default: the processors that this process may use
VARIATOR_CUDA_ARCHS="80;90a"  GPU architectures; default: the local GPU's, else these with PTX
CXX, CXXFLAGS                 the compiler and its flags, as usual
CUDACXX, CUDA_HOME            where nvcc is, if not on PATH or below /usr/local
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_backend import cutlass_headers, environment, find_nvcc, why_no_cuda  # noqa: E402

PARTS = environment.PARTS
# What CMake takes from the environment when it configures a folder for the first time.
FLAGS = ("CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "CMAKE_BUILD_TYPE")
RECORD = "variator_kernels/_build_info.json"
# The file name of an extension for this Python ends so.
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX") or ".so"


class NotBuilt(Exception):
    """Why a part could not be built, in one sentence."""


def missing_parts(required: list[str], info: dict) -> list[str]:
    """One sentence for each required part that was not built."""
    return [
        f"VARIATOR_REQUIRE={part}: {info[part]['reason']}"
        for part in required
        if not info[part]["built"]
    ]


def find_compiler(cxx: str) -> str:
    """The command of the C++ compiler: CXX where it is set, else the first one on PATH."""
    if cxx.strip():
        if shutil.which(shlex.split(cxx)[0]) is None:
            raise NotBuilt(f"no C++ compiler: CXX={cxx} was not found")
        return cxx
    # GCC first: Clang's OpenMP runtime is not the one that torch runs on.
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return name
    raise NotBuilt(
        "no C++ compiler: g++, c++ and clang++ were not found on PATH, and CXX is not set"
    )


def find_tool(name: str, folder_attribute: str) -> str | None:
    """A program that came as a Python package (cmake, ninja), else the one on PATH."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute)
    except Exception:  # absent or damaged: PATH may still have it
        folder = None
    return (shutil.which(name, path=folder) if folder else None) or shutil.which(name)


def first_error(output: str) -> str:
    """The line of a build log to show as the reason."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if "error" in line.lower():
            # CMake prints the place on one line and the message on the next.
            return " ".join(lines[index : index + 2]) if line.startswith("CMake") else line
    return lines[-1] if lines else "no output"


def run_step(step: str, command: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        raise NotBuilt(f"{step} failed: {first_error(done.stdout)}")


def find_cutlass() -> str:
    """:func:`build_backend.cutlass_headers`, which must be there."""
    if (folder := cutlass_headers()) is None:
        raise NotBuilt("CUTLASS's headers were not found (the package nvidia-cutlass has them)")
    return folder


def parallel_jobs() -> int:
    """How many files to compile at once: as asked for, else the processors usable here."""
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        if (jobs := environment.positive(name)) is not None:
            return jobs
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(usable or 1, container_cpus() or usable or 1))


def container_cpus(root: str = "/sys/fs/cgroup") -> int | None:
    """The processors that a container's quota amounts to, rounded up; None without a quota."""
    try:
        second = Path(root, "cpu.max")
        if second.exists():
            quota, period = second.read_text().split()
        else:
            folder = Path(root, "cpu")
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text()
        return None if quota in ("max", "-1") else max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return None


def build(part: str, source: Path, work: Path, options: list[str]) -> tuple[Path, dict]:
    """Builds the extension of ``source`` below ``work``; returns its path and CMake's report."""
    if os.name == "nt":
        raise NotBuilt("the extension is not supported on Windows")
    compiler = find_compiler(os.environ.get("CXX", ""))
    cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
    if cmake is None:
        raise NotBuilt("CMake was not found")
    try:
        import pybind11
    except ImportError:
        raise NotBuilt("pybind11 is not installed") from None

    # One folder a configuration, so that a second build compiles only what changed. The tools may
    # lie in a temporary folder (build isolation), so their paths are given anew each time.
    flags = [os.environ.get(name, "") for name in FLAGS]
    settings = [part, compiler, *flags, sys.executable, bool(ninja)]
    key = hashlib.sha256(repr([*settings, *options]).encode()).hexdigest()[:12]
    folder = work / f"cmake-{key}"
    tools = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    if ninja:
        tools += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    env = {**os.environ, "CXX": compiler}
    configure = [cmake, "-S", str(source), "-B", str(folder), *tools, *options]
    run_step("CMake's configuration", configure, env)
    jobs = str(parallel_jobs())
    run_step("the compilation", [cmake, "--build", str(folder), "--parallel", jobs], env)

    report = json.loads((folder / "build_report.json").read_text())
    return folder / report.pop("file"), report


def build_cpu(work: Path) -> tuple[Path, dict]:
    sanitize = "ON" if environment.switch("VARIATOR_SANITIZE") else "OFF"
    more = environment.cmake_arguments()
    try:
        return build("cpu", ROOT, work, [f"-DVARIATOR_SANITIZE={sanitize}", *more])
    except NotBuilt as why:
        if more and str(why).startswith("CMake's configuration failed"):
            # Asked for by hand: to go on without them and without kernels would hide a slip.
            raise CompileError(f"VARIATOR_CMAKE_ARGS={shlex.join(more)}: {why}") from None
        raise


def build_cuda(work: Path) -> tuple[Path, dict]:
    if (reason := why_no_cuda()) is not None:
        raise NotBuilt(reason)
    nvcc = find_nvcc()
    if nvcc is None:
        raise NotBuilt("nvcc was not found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda*)")
    options = [
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DVARIATOR_CUTLASS={find_cutlass()}",
        f"-DVARIATOR_CUDA_ARCHS={environment.cuda_architectures()}",
    ]
    return build("cuda", ROOT / "csrc" / "cuda", work, options)


BUILDERS = {"cpu": build_cpu, "cuda": build_cuda}
WITHOUT = {
    "cpu": "The package will work without them, but slower.",
    "cuda": "On a GPU the package will use other backends.",
}


class BuildExtension(build_ext):
    """Builds what can be built and records the rest."""

    def run(self) -> None:
        try:
            environment.check_build()
        except ValueError as error:
            raise OptionError(str(error)) from None
        if unknown := environment.unknown_names():
            print(unknown, file=sys.stderr, flush=True)
        required = environment.required_parts()
        package = self.target()
        package.mkdir(parents=True, exist_ok=True)

        info: dict = {part: {"built": False, "reason": "not tried"} for part in PARTS}
        info["compiler"] = ""
        work = Path(self.get_finalized_command("build").build_base)
        for part in PARTS:
            built = None
            try:
                built, report = BUILDERS[part](work)
                if part == "cpu":
                    info["compiler"] = report.pop("compiler")
                info[part].update(built=True, **report)
            except NotBuilt as why:
                info[part]["reason"] = str(why)
                print(
                    f"variator_kernels: the {part.upper()} kernels were not built: {why}. "
                    f"{WITHOUT[part]} (VARIATOR_REQUIRE={part} makes this an error.)",
                    file=sys.stderr,
                    flush=True,
                )
            # Removed, never overwritten: a process may run it. A leftover is worse than none. In
            # the sources lie other Pythons' builds too, but a wheel holds this one's alone.
            for earlier in package.glob(f"_{part}{SUFFIX if self.inplace else '*.so'}"):
                earlier.unlink()
            if built is not None:
                shutil.copy2(built, package / built.name)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        if missing := missing_parts(required, info):
            raise CompileError("; ".join(missing))

    def target(self) -> Path:
        """The folder that the extensions go to."""
        return Path(self.get_ext_fullpath("variator_kernels._cpu")).parent

    def written(self) -> list[Path]:
        """The extensions of this Python that lie there, and the record."""
        names = [*(f"_{part}{SUFFIX}" for part in PARTS), "_build_info.json"]
        return [file for name in names if (file := self.target() / name).exists()]

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(file) for file in self.written()]

    def get_output_mapping(self) -> dict[str, str]:
        """For editable installs: what a wheel would hold, and the file in the sources it is."""
        folder = Path(self.build_lib, "variator_kernels")
        files = self.written() if self.inplace else []
        return {str(folder / file.name): str(file) for file in files}


class BuildWheel(bdist_wheel):
    """Tags a wheel without kernels ``py3-none-any``: it holds nothing of this platform, and where
    one with kernels is at hand too, pip takes that."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            record = Path(self.get_finalized_command("build_ext").build_lib, RECORD)
            info = json.loads(record.read_text())
            if not any(info[part]["built"] for part in PARTS):
                self.distribution.ext_modules = []
                self.root_is_pure = True


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("variator_kernels._cpu", sources=[])],
        cmdclass={"build_ext": BuildExtension, "bdist_wheel": BuildWheel},
    )
