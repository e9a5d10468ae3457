"""Triton's kernels compiled for real GPUs, without one. `make compile-table` compiles all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton_names import ATTENTION, sublayer_kernels

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton", reason="Triton is not installed")


def compile_for(archs, folder, *arguments):
    # A process of its own: in this one the kernels are interpreted.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.tools.compile_triton", "--output", str(folder)]
    done = subprocess.run(
        [*command, "--arch", *archs.split(), *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done, json.loads((folder / "triton.json").read_text())["rows"]


# T5-base at k=4 is compiled in every form of groups and for few tokens: once is enough here, the
# committed table has it for each architecture.
SHAPES = ("bert-base", "grouped queries")


@pytest.mark.parametrize(
    "arch, model, ratios, attentions",
    [("sm_90", "t5-base", "4 32", ()), ("sm_90", "llama-7b", "2", SHAPES),
     ("sm_80", "bert-base", "8", SHAPES), ("gfx942", "t5-base", "8", ()),
     ("sm_100", "t5-base", "4", ()), ("sm_120", "t5-base", "4", ()),
     ("gfx950", "t5-base", "4", ())],
)  # fmt: skip
def test_compiles_without_spills(arch, model, ratios, attentions, tmp_path):
    arguments = ("--model", model, "--dtype", "bf16", "--attention", *attentions, "--bottleneck",
                 "64", "--ratio", *ratios.split())  # fmt: skip
    done, rows = compile_for(arch, tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = ATTENTION if attentions else set()
    for ratio in ratios.split():
        wanted = wanted | sublayer_kernels(model, int(ratio))
    assert {row["kernel"] for row in rows} == wanted


WIDE = """
import torch
from bench.tools.triton_cases import ATTENTIONS, Attention, attention
from bench.tools.triton_compiler import compile_call
for model, dtype, size in (
    (ATTENTIONS["llama-7b"], torch.float32, (8, 512, 128)),
    (ATTENTIONS["t5-base around"], torch.float32, (8, 512, 128)),
    (ATTENTIONS["t5-base around"], torch.float64, (8, 512, 128)),
    (Attention(1, 1, 1, "everything"), torch.bfloat16, (1, 1, 1)),
    (Attention(3, 1, 7, "means"), torch.float16, (1, 3, 5)),
):
    rows = compile_call("sm_90", attention(model, dtype, size))
    assert len(rows) == 3
    for row in rows:
        # fp32 products are three of the tensor cores' each: the gradient of queries with heads of
        # 128 wants a few registers more than there are, with every tile that was tried.
        few = 20 if model.d == 128 and row["kernel"] == "query_gradient_kernel" else 0
        assert row["spills"] <= few or model.d < 16, row  # heads that no model has need but run
        assert row["shared"] <= 227 * 1024, row
"""


# Sizes of one, and rows that are not aligned: the compiler makes constants of ones and uses
# multiples of 16; the interpreter does not.
ODD = """
import torch
from bench.tools.triton_cases import Model, sublayer
from bench.tools.triton_compiler import compile_call
from tests.triton_names import SUBLAYER
rms, layer = Model(1, 1, "relu", "rms"), Model(50, 41, "gelu_tanh", "layer", gated=True)
for model, k, dtype, form, size in (
    (rms, 2, torch.bfloat16, "plain", (1, 1, 1)),
    (layer, 5, torch.float16, "masked", (1, 3, 5)),
    (layer._replace(norm="rms", d=24), 4, torch.float32, "packed", (1, 7, 8)),
    (layer, 5, torch.bfloat16, "kept", (2, 75, 130)),
):
    rows = compile_call("sm_90", sublayer(model, k, dtype, form, size=size))
    assert SUBLAYER <= {row["kernel"] for row in rows}, rows
"""


# What the sanitizer runs fits on the chip.
WIDE_BOTTLENECKS = """
import itertools
import torch
from bench.tools import compile_triton, sanitize, triton_cases
from bench.tools.triton_compiler import compile_call
model = triton_cases.Model(40, 136, "relu", "layer", gated=True)
(size,) = (size for size in sanitize.SIZES if size[2] == 512)
for arch in ("sm_80", "sm_90"):
    d, k, r = size
    call = triton_cases.sublayer(model._replace(d=d), k, torch.bfloat16, size=(2, 75, r))
    for row in compile_call(arch, call):
        assert row["shared"] <= compile_triton.SHARED_LIMIT[arch], row
"""


def test_odd_sizes_wide_types_and_wide_bottlenecks():
    """One process for all: it would import PyTorch and Triton for each."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ODD + WIDE + WIDE_BOTTLENECKS], cwd=ROOT, env=env,
                          text=True, capture_output=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
