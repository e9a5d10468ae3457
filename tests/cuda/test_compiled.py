"""What nvcc made of the kernels, read from the built extension; no GPU needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.tools import cuda_resources
from variator_kernels import extension

ROOT = Path(__file__).parents[2]
MODULE = cuda_resources.module_path()
WHY = extension.build_info().get("cuda", {}).get("reason", "the package was never built")
pytestmark = pytest.mark.skipif(MODULE is None, reason=f"no CUDA kernels were compiled: {WHY}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What `make cuda-table` writes, by a process that knows nothing of the emulation."""
    if cuda_resources.disassembler() is None:
        pytest.skip("cuobjdump is neither on PATH nor in Triton's package")
    folder = tmp_path_factory.mktemp("resources")
    command = [sys.executable, "-m", "bench.tools.cuda_resources", "--output", str(folder)]
    env = {**os.environ, "VARIATOR_CUDA_EXTENSION": ""}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "resources.json").read_text())["kernels"]


def test_no_spills_no_stack_and_matrix_instructions(rows):
    assert rows and cuda_resources.faults(rows) == []


def test_faults_are_seen(rows):
    """The check can fail."""
    bad = {**rows[0], "stack": 8}
    assert len(cuda_resources.faults([bad])) == 1


def test_every_kernel_is_there_for_every_architecture(rows):
    names = {row["kernel"] for row in rows if not row["kernel"].startswith("gemm_")}
    for arch in {row["arch"] for row in rows}:
        here = {row["kernel"] for row in rows if row["arch"] == arch}
        assert names <= here
        tiles = ("64x128", "128x192", "128x256")
        wanted = (
            {f"gemm_sm90_{tile}" for tile in tiles} if arch == "sm_90a" else {"gemm_sm80_128x128"}
        )
        assert {name for name in here if name.startswith("gemm_")} == wanted


def test_the_committed_table_has_every_kernel(rows):
    """Numbers differ by compiler; what was compiled must not."""
    committed = json.loads((cuda_resources.OUTPUT / "resources.json").read_text())["kernels"]

    def names(table):
        return {(row["kernel"], row["variant"], row["arch"]) for row in table}

    both = {row["arch"] for row in rows} & {row["arch"] for row in committed}
    assert both
    assert {n for n in names(rows) if n[2] in both} == {n for n in names(committed) if n[2] in both}


def test_a_gemm_without_a_factor_loads_none():
    """CUTLASS's VisitorAuxLoad by itself reads from address 0 where there is no factor."""
    if cuda_resources.disassembler() is None:
        pytest.skip("cuobjdump is neither on PATH nor in Triton's package")
    symbols = [
        r["symbol"] for r in cuda_resources.resources(MODULE) if r["kernel"] == "gemm_sm80_128x128"
    ]
    assert all("FactorLoad" in s and "VisitorAuxLoad" not in s for s in symbols)


def test_it_loads_without_torch_and_without_a_driver():
    """Nothing of torch or the driver is linked, so an import cannot fail for lack of a GPU."""
    done = subprocess.run(
        ["readelf", "--dynamic", "--wide", MODULE], capture_output=True, text=True, check=True
    )
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout)
    system = r"lib(stdc\+\+|gcc_s|m|c|dl|rt|pthread)\.so(\.\d+)*|ld-linux.*"
    assert [name for name in needed if not re.fullmatch(system, name)] == []
    script = (
        "import importlib.util as u, sys; "
        f"s = u.spec_from_file_location('variator_kernels._cuda', {str(MODULE)!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "print(m.emulated, m.runtime_version >= 12000, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "False"]
