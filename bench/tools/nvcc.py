"""nvcc, where there is one: the machine code of a file for Hopper, programs that the host runs."""

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from bench.harness.machine import ROOT

SOURCES = ROOT / "csrc" / "cuda"
KEPT = ROOT / "build" / "machine_code"
ARCH = "sm_90a"


@functools.cache
def nvcc() -> str:
    """Its path.

    Raises:
        FileNotFoundError: there is none.
    """
    places = [shutil.which("nvcc"), *map(str, Path("/usr/local").glob("cuda*/bin/nvcc"))]
    if (found := next(filter(None, places), None)) is None:
        raise FileNotFoundError("nvcc is neither on PATH nor in /usr/local/cuda*")
    return found


@functools.cache
def cutlass() -> Path:
    """The folder of CUTLASS's headers: CUTLASS_PATH's, or the package nvidia-cutlass's.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = os.environ.get("CUTLASS_PATH", "")
    if not folder:
        spec = importlib.util.find_spec("cutlass_library")
        folder = str(Path(spec.origin).parent / "source") if spec and spec.origin else ""
    if not Path(folder, "include", "cutlass", "cutlass.h").exists():
        raise FileNotFoundError("CUTLASS's headers were not found: CUTLASS_PATH names their folder")
    return Path(folder)


def _made(source: Path, *options: str) -> Path:
    """What nvcc makes of a file: kept in ``build`` until a source or an option changes."""
    command = [nvcc(), f"-arch={ARCH}", "-std=c++17", "-O3", "-DNDEBUG", f"-I{SOURCES}", *options]
    if "gemm" in str(source.relative_to(ROOT)):
        command += ["--expt-relaxed-constexpr"]
        command += [f"-isystem={cutlass() / of}" for of in ("include", "tools/util/include")]
    key = hashlib.sha256(repr(command).encode())
    for file in sorted([source, *SOURCES.rglob("*.cu*"), *SOURCES.rglob("*.h")]):
        key.update(file.read_bytes())
    made = KEPT / f"{source.stem}-{key.hexdigest()[:12]}"
    if not made.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        part = KEPT / f"{made.name}.{os.getpid()}"
        subprocess.run([*command, "-o", str(part), str(source)], check=True)
        part.replace(made)
    return made


def cubin(source: Path) -> bytes:
    """The machine code of a file's kernels for Hopper."""
    return _made(source, "-cubin").read_bytes()


def output(source: Path, *arguments: object) -> bytes:
    """What the program of a file with a ``main`` prints."""
    command = [str(_made(source)), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout
