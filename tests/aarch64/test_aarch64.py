"""The portable CPU kernels, compiled for aarch64 and run in an emulator: `make aarch64`.

They are held against the same program built for this machine, whose kernels tests/ops holds against
the reference. AARCH64_CXX and QEMU_AARCH64 name a cross compiler and the emulator.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [*ROOT.glob("csrc/cpu/*.cpp"), Path(__file__).with_name("kernels.cpp")]
X86 = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
LEFT_OUT = ("bindings.cpp", *(f"isa_{name}.cpp" for name in X86))
# As CMakeLists.txt has them; static, so that the emulator needs no libraries.
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-fno-math-errno", "-static"]
FLAGS += ["-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", f"-I{ROOT / 'csrc'}"]


def tool(variable: str, default: str) -> list[str]:
    command = shlex.split(os.environ.get(variable) or default)
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed ({variable} names another)")
    return command


def outputs(compiler: list[str], emulator: list[str], program: Path) -> dict[str, np.ndarray]:
    """By the name of the case and of the output."""
    sources = [str(file) for file in SOURCES if file.name not in LEFT_OUT]
    command = [*compiler, *FLAGS, *sources, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([*emulator, str(program)], capture_output=True, check=True, timeout=300)
    assert done.stderr == b"", done.stderr.decode()
    found, rest = {}, done.stdout
    while rest:
        line, rest = rest.split(b"\n", 1)
        name, count = line.decode().rsplit(" ", 1)
        found[name], rest = np.frombuffer(rest[: 8 * int(count)]), rest[8 * int(count) :]
    return found


@pytest.mark.slow
def test_the_portable_kernels_on_aarch64(tmp_path):
    cross = tool("AARCH64_CXX", "aarch64-linux-gnu-g++")
    emulator = tool("QEMU_AARCH64", "qemu-aarch64")
    here = outputs(tool("CXX", "g++"), [], tmp_path / "here")
    there = outputs(cross, emulator, tmp_path / "there")
    assert list(there) == list(here) and len(here) == 4 * 3 * 3 * 2 * 16
    here, there = joined(here), joined(there)
    for name, expected in here.items():
        # The rule of tests/ops for gradients, with this machine's kernels as the measure.
        truth = here[" ".join(["float64", *name.split()[1:]])]
        scale = max(root_mean_square(truth), 1e-3)
        error, measure = (root_mean_square(v - truth) / scale for v in (there[name], expected))
        assert error <= 2 * measure + (1e-12 if name.startswith("float64") else 1e-6), name


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def joined(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With each bias gradient, of few numbers, at the end of its weight's."""
    weights = {"d_bc": "d_wc", "d_b1": "d_w1u", "d_b2": "d_w2", "d_norm_bias": "d_norm_weight"}
    made: dict[str, np.ndarray] = {}
    for name, values in found.items():
        case, output = name.rsplit(" ", 1)
        name = f"{case} {weights.get(output, output)}"
        made[name] = np.append(made[name], values) if name in made else values
    return made
