"""What nvcc makes of the kernels for Blackwell; no GPU and no CUTLASS needed.

`make cuda-table` looks at all kernels of a built module. These have the least registers to spare:
with other loops they kept one of them in local memory.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
pytestmark = [pytest.mark.skipif(NVCC is None, reason="there is no nvcc"), pytest.mark.slow]
TIGHT = """
#include "heuristics.h"
#include "kernels/decompress.cuh"
#include "kernels/merge.cuh"
namespace variator::cuda {
template __global__ void merge_kernel<BF16, 3>(const MergeParams);
template __global__ void decompress_kernel<BF16, true>(const DecompressParams, int);
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("blackwell")


def compiled(arch, folder, source):
    """Bytes of stack and spills of each kernel, as ptxas says."""
    path = folder / "kernels.cu"
    path.write_text(source)
    cubin = folder / f"{arch}.cubin"
    command = [
        NVCC,
        "-cubin",
        f"-arch={arch}",
        "-std=c++17",
        "-O3",
        "-DNDEBUG",
        "-Xptxas=-v",
    ]
    done = subprocess.run(
        [*command, f"-I{CSRC}", "-o", cubin, path], capture_output=True, text=True, check=False
    )
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc knows no {arch}")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", done.stdout + done.stderr)
    return [tuple(map(int, pair)) for pair in found]


@pytest.mark.parametrize("arch", ["sm_100", "sm_120"])
def test_no_register_is_kept_in_memory(arch, folder):
    assert compiled(arch, folder, TIGHT) == [(0, 0), (0, 0)]


def test_local_memory_is_seen(folder):
    """The check can fail."""
    indexed = "__global__ void k(int* p) { int a[32]; for (int i = 0; i < 32; ++i) a[p[i]] = i;"
    ((stack, _),) = compiled("sm_100", folder, indexed + " *p = a[p[33]]; }")
    assert stack >= 128
