"""What the CUDA build knows before it compiles: architectures, and the GEMMs' files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
TILES = re.compile(r"gemm_tiles\[\] = \{(.*)\};")
CMAKE = shutil.which("cmake")


def choose(tmp_path: Path, wanted: str, gpus: str = "") -> str:
    """``architectures|hopper|others`` as CMake chooses them where nvidia-smi prints ``gpus``."""
    if CMAKE is None:
        pytest.skip("CMake is not installed")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{gpus}'\nexit {0 if gpus else 9}\n")
    smi.chmod(0o755)
    script = tmp_path / "choose.cmake"
    script.write_text(
        f'cmake_minimum_required(VERSION 3.24)\ninclude("{CSRC}/architectures.cmake")\n'
        f'choose_architectures("{wanted}")\n'
        'message("${architectures}|${hopper}|${others}")\n'
    )
    done = subprocess.run(
        [CMAKE, "-P", script], env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    return " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("wanted", "gpus", "chosen"),
    [
        ("", "", "80;90a-real|90a-real|80"),
        ("", "9.0\\n9.0\\n", "90a-real|90a-real|"),
        ("", "7.5\\n8.6\\n", "86||86"),
        ("", "No devices were found", "80;90a-real|90a-real|80"),
        ("90", "8.0", "90a-real|90a-real|"),
        # wgmma and TMA compiled for sm_90 without the a would trap on the GPU.
        ("90-real;sm_90a", "", "90a-real|90a-real|"),
        ("90a;90-virtual", "", "90a-real;90-virtual|90a-real|90-virtual"),
        ("100f-real", "", "100f-real||100f-real"),
        ("80;90a;100;120", "", "80;90a-real;100;120|90a-real|80;100;120"),
        ("", "10.0\\n12.0\\n", "100;120||100;120"),
    ],
)
def test_architectures(tmp_path, wanted, gpus, chosen):
    assert choose(tmp_path, wanted, gpus) == chosen


@pytest.mark.parametrize(
    ("wanted", "gpus", "why"),
    [("", "7.5", "the local GPU is older than sm_80"), ("75", "", "75 is not 80"),
     ("hopper", "", "hopper is not 80")],
)  # fmt: skip
def test_architectures_that_are_refused(tmp_path, wanted, gpus, why):
    assert why in choose(tmp_path, wanted, gpus)


def test_what_each_file_is_compiled_for(tmp_path):
    """wgmma for sm_90a alone; Blackwell has none, so its GEMMs are those with mma.sync."""
    nvcc = shutil.which("nvcc")
    if CMAKE is None or nvcc is None:
        pytest.skip("CMake or nvcc is not installed")
    pybind11 = pytest.importorskip("pybind11").get_cmake_dir()
    done = subprocess.run(
        [CMAKE, "-S", CSRC, "-B", tmp_path, "-G", "Ninja","-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
         f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DPython_EXECUTABLE={sys.executable}",
         f"-Dpybind11_DIR={pybind11}", "-DVARIATOR_CUDA_ARCHS=80;90a;100;120",
         f"-DVARIATOR_CUTLASS={tmp_path}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    found = {
        Path(each["file"]).stem: re.findall(r"code=\[(\S+?)\]", each["command"])
        for each in commands
        if each["file"].endswith(".cu")
    }
    both = ["compute_80,sm_80", "compute_100,sm_100", "compute_120,sm_120"]
    for name, codes in found.items():
        if name.startswith("gemm_sm90"):
            assert codes == ["sm_90a"], name
        elif name.startswith("gemm_sm80"):
            assert codes == both, name
        else:
            assert codes == [both[0], "sm_90a", *both[1:]], name
    gemms = {name.split("_")[1] for name in found if name.startswith("gemm_")}
    assert gemms == {"sm80", "sm90"} and {"merge", "decompress", "backward"} <= set(found)


def test_every_tile_has_a_file_with_both_types():
    """A tile that none instantiates would be missing when the module is loaded, on a GPU."""
    tiles = re.findall(r"\{(\d+), (\d+)", TILES.search((CSRC / "heuristics.h").read_text())[1])
    found = {file.name: file.read_text() for file in (CSRC / "gemm").glob("*.cu")} | {"gemm.cu": ""}
    wanted = [("80", "128", "128"), *(("90", *tile) for tile in tiles)]
    assert len(wanted) == 4 and found.keys() == {"gemm.cu"} | {
        f"gemm_sm{arch}_{rows}x{columns}.cu" for arch, rows, columns in wanted
    }
    for arch, rows, columns in wanted:
        text = found[f"gemm_sm{arch}_{rows}x{columns}.cu"]
        for dtype in ("bfloat16", "float16"):
            assert f"gemm_sm{arch}<{rows}, {columns}, DType::{dtype}>();" in text
