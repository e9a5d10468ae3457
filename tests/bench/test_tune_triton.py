"""The tuner keeps what is right and fast, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench.cases import models
from bench.harness.clock import Graph
from bench.tools import tune_triton
from variator_kernels import backends
from variator_kernels.triton_kernels import launch

TRITON = next(status for status in backends.status() if status.name == "triton")


@pytest.mark.skipif(not TRITON.usable, reason=f"no Triton kernels: {TRITON.detail}")
def test_tunes(monkeypatch, tmp_path):
    good = {"bt": 16, "bd": 16, "br": 16, "warps": 4, "stages": 1}
    bad = {**good, "bd": 24}  # not a power of two
    monkeypatch.setattr(tune_triton, "CANDIDATES", {"adapter_decompress": [bad, good]})
    small = models.toy(models.architecture("t5-base")).config
    monkeypatch.setitem(tune_triton.CONFIGS, "t5-base", lambda: small)
    monkeypatch.setitem(tune_triton.CASES, "t5-base", (1, 16))
    medians = iter([2.0, 1.0])
    monkeypatch.setattr(tune_triton, "quartiles", lambda samples: {"median": next(medians)})
    table, before = tune_triton.Table(tmp_path / "launch.json"), len(launch.table())
    try:
        tried = tune_triton.tune("t5-base", 4, table, Graph("cpu"), time.monotonic() + 100, 1)
    finally:
        launch.use(json.loads(launch.TABLE.read_text()))
    assert sorted(t.get("seconds") or 0 for t in tried if "kernel" in t) == [0, 1.0, 2.0]
    rows = json.loads((tmp_path / "launch.json").read_text())
    assert len(rows) == before + 1 and rows[-1]["settings"] == good
    case = rows[-1]["case"]
    assert (case["d"], case["r"], case["rows"]) == (32, 64, "few"), case


AHEAD = """
import torch
from bench.tools import triton_cases, tune_triton
triton_cases.MODELS["t5-base"] = triton_cases.Model(32, 48, "relu", "rms")
settings = {"bt": 16, "bd": 16, "br": 64, "warps": 2, "stages": 1}
row = {"kernel": "adapter_decompress", "case": {"arch": "sm_90"}, "settings": settings}
tune_triton.compile_ahead("t5-base", 4, row)
"""


@pytest.mark.skipif(not TRITON.usable, reason=f"no Triton kernels: {TRITON.detail}")
def test_a_worker_leaves_what_it_compiled(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", AHEAD], env=env, check=True, timeout=300)
    (made,) = tmp_path.glob("*/adapter_decompress_kernel.json")
    assert json.loads(made.read_text())["num_warps"] == 2


def test_every_row_of_the_table_can_win():
    for row in launch.table():
        assert set(row["case"]) <= {
            "arch",
            "d",
            "f",
            "k",
            "r",
            "dtype",
            "activation",
            "rows",
            "terms",
        }
        assert launch.settings(row["kernel"], **row["case"]) == row["settings"]


def test_settings_know_how_many_programs_there_would_be(monkeypatch):
    x = torch.empty(0, dtype=torch.bfloat16)
    monkeypatch.setattr(launch, "processors", lambda x: 132)
    monkeypatch.setattr(launch, "arch", lambda x: "sm_90")
    few, many = (
        launch.case(x, 768, 4, launch.tiles(tokens)) for tokens in (131 * 64, 131 * 64 + 1)
    )
    assert (few["rows"], many["rows"]) == ("few", "many")
    for kernel in ("group_merge", "adapter_decompress"):
        assert launch.settings(kernel, **few)["bt"] < launch.settings(kernel, **many)["bt"]


@pytest.mark.skipif(not TRITON.usable, reason=f"no Triton kernels: {TRITON.detail}")
@pytest.mark.parametrize("tiles, programs", [(8, 96), (66, 132), (100, 100), (256, 256)])
def test_few_tiles_share_out_their_columns(tiles, programs):
    from variator_kernels.ops.adapter_decompress.triton import blocks_a_program

    assert tiles * -(-12 // blocks_a_program(tiles, 12, 132)) == programs


def test_a_kernel_without_a_row_is_an_error():
    with pytest.raises(LookupError, match="no row for kernel 'unknown'"):
        launch.settings("unknown")


def test_an_architecture_has_the_rows_of_the_one_that_it_is_like(monkeypatch):
    wide = {"d": 768, "k": 4, "dtype": "bfloat16", "rows": "many", "r": 512}

    def settings(kernel, arch):
        return launch.settings(kernel, arch=arch, **wide)

    assert settings("group_merge", "gfx950") == settings("group_merge", "gfx942")
    assert settings("merge_backward", "sm_89") == settings("merge_backward", "sm_80")
    assert settings("merge_backward", "sm_80") != settings("merge_backward", "sm_90")
    # 110,656 bytes of shared memory on sm_80: more than these have.
    small = settings("adapter_decompress", "sm_120")
    assert small != settings("adapter_decompress", "sm_80")
    for arch in ("sm_86", "sm_89", "sm_121"):
        assert settings("adapter_decompress", arch) == small
    monkeypatch.setattr(launch, "LIKE", {})
    launch.settings.cache_clear()
    assert settings("adapter_decompress", "sm_121") != small
    launch.settings.cache_clear()
