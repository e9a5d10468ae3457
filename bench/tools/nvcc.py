"""nvcc, where there is one: the machine code of a file for Hopper, programs that the host runs."""

import hashlib
import os
import subprocess
from pathlib import Path

import build_backend
from bench.harness.machine import ROOT

SOURCES = ROOT / "csrc" / "cuda"
KEPT = ROOT / "build" / "machine_code"
ARCH = "sm_90a"


def _found(what: str, place: str | None) -> str:
    if place is None:
        raise FileNotFoundError(f"{what} was not found")
    return place


def _made(source: Path, *options: str) -> Path:
    """What nvcc makes of a file: kept in ``build`` until a source or an option changes.

    Raises:
        FileNotFoundError: nvcc, or CUTLASS's headers that the file needs, are missing.
    """
    command = [
        _found("nvcc", build_backend.any_nvcc()),
        f"-arch={ARCH}",
        "-std=c++17",
        "-O3",
        "-DNDEBUG",
        f"-I{SOURCES}",
        *options,
    ]
    if "gemm" in str(source.relative_to(ROOT)):
        command += ["--expt-relaxed-constexpr"]
        headers = Path(_found("CUTLASS (CUTLASS_PATH)", build_backend.cutlass_headers()))
        command += [f"-isystem={headers / of}" for of in ("include", "tools/util/include")]
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
