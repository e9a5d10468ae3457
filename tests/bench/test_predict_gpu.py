"""Predictions from machine code: bounds, parameters, the page and the committed figures."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench.tools import cuda_cases, predict_gpu
from bench.tools.gpu_bounds import CHIPS, Work, predict
from bench.tools.sass_walk import Count
from bench.tools.triton_cases import MODELS


def test_the_greatest_of_five_bounds():
    chip = CHIPS["H200"]
    found = predict(Work("some_kernel", 133, 0, Count(slots=7320.0, flops=4096.0)), chip)
    assert found["bound"] == found["issue"] == 2.0 and found["by"] == "issue"  # two turns of 1 µs
    found = predict(Work("some_kernel", 132, 4800, Count(1.0, 0.0, 1830.0, 1830.0)), chip)
    assert (found["shared"], found["L1"], found["by"]) == (1.0, 2.0, "L1")
    found = predict(Work("some_kernel", 1, 48_000_000, Count(flops=1.0)), chip)
    assert found["bound"] == 10.0 and found["by"] == "memory" and "issue" not in found


def test_parameter_structs_are_those_of_the_header():
    """Sizes as a C++ compiler lays them out."""
    sizes = {name: ctypes.sizeof(of) for name, of in cuda_cases.structs().items()}
    assert sizes["Groups"] == 5 * 8 + 5 * 8 and sizes["Vector"] == 16
    assert sizes["NormParams"] == 8 + 2 * 16 + 8
    groups = cuda_cases.structs()["Groups"]
    assert [name for name, _ in groups._fields_][-2:] == ["launched", "k"]
    assert cuda_cases.structs()["LayerParams"].merge.size == sizes["MergeParams"]


def test_the_page_says_what_it_is(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.tools.predict_gpu", "--backend", "triton"]
    command += [
        "--part",
        "forward",
        "--model",
        "bert-base",
        "--ratio",
        "4",
        "--page",
        page,
        "--figures",
        figures,
    ]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for text in (page.read_text(), predict_gpu.PAGE.read_text()):
        assert "never measured" in text and "No GPU was used" in text
        assert "group_merge_kernel" in text and "adapter_decompress_kernel" in text
    found = json.loads(figures.read_text())
    assert found["measured"] is False
    (decompress,) = (r for r in found["rows"] if r["kernel"] == "adapter_decompress_kernel")
    # x, y, u and W_1h h once: 16,384 tokens of 768 bf16 twice and of 64 fp32, a quarter of u.
    least = 16384 * (768 * 2 * 2.25 + 64 * 4) / 4.8e12 * 1e6
    assert least < decompress["memory"] < 1.1 * least
    # 384 tiles [128, 256] of the first product, 3 a multiprocessor; a tile has 48 steps of 16:
    # 2·128·256·16 FLOPs, and 2 x (64 + 256) rows of 32 bytes that two HGMMA read and 384 that TMA
    # writes. Behind it a tile's fp32 results go through shared memory and back, with conflicts less
    # than twice.
    (linear,) = (r for r in found["rows"] if r["kernel"] == "linear_kernel")
    steps = 3 * 48 * (2 * 320 + 384) * 32 / 128
    assert linear["tensor"] == round(3 * 48 * 2 * 128 * 256 * 16 / 4096 / 1830, 2)
    behind = 3 * 2 * 128 * 256 * 4 / 128
    assert steps / 1830 < linear["shared"] < (steps + 2 * behind) / 1830


def test_the_committed_figures_are_predictions():
    found = json.loads(predict_gpu.FIGURES.read_text())
    assert found["predicted"] is True and found["measured"] is False
    for row in found["rows"]:
        bounds = {name: row[name] for name in ("issue", "tensor", "shared", "L1", "memory")}
        assert row["bound"] == max(bounds.values()) == bounds[row["by"]]


@pytest.mark.parametrize(
    ("kernel", "k", "most"),
    [("merge_kernel", 4, 10), ("decompress_kernel", 4, 15), ("merge_kernel", 16, 12)],
)
def test_what_the_cuda_kernels_were_redesigned_for(kernel, k, most):
    """Microseconds for T5-base, 32 x 512 tokens, on an H200; not bound by issued instructions."""
    found = json.loads(predict_gpu.FIGURES.read_text())["rows"]
    (row,) = [
        row for row in found
        if (row["part"], row["backend"], row["model"], row["kernel"], row["k"])
        == ("forward", "cuda", "t5-base", kernel, k)
    ]  # fmt: skip
    assert row["bound"] <= most and row["by"] != "issue"


def test_layers_are_sums_of_their_kernels():
    rows = json.loads(predict_gpu.FIGURES.read_text())["rows"]
    found = {(row["model"], row["k"]): row for row in predict_gpu.layers(rows)}
    layer = found["t5-base", 4]
    assert layer["all"] <= 85 and layer["all"] < layer["H100"]
    assert layer["all"] == pytest.approx(layer["merge"] + layer["products"] + layer["decompress"])
    for name, model in MODELS.items():
        for k in (2, 4, 8, 16):
            mine = [r for r in rows if (r["part"], r["backend"]) == ("forward", "cuda")]
            mine = [r for r in mine if (r["model"], r["k"]) == (name, k)]
            assert len(mine) == 4 + model.gated
            assert found[name, k]["all"] == pytest.approx(sum(row["bound"] for row in mine))
    assert predict_gpu.layers([row for row in rows if "gemm" not in row["kernel"]]) == []


@pytest.mark.parametrize("model", ["t5-base", "bert-base"])
def test_launches_of_a_backward_pass(model):
    """Parameters as large as their structs, and every gradient's bytes once."""
    try:
        case = cuda_cases.Case(MODELS[model], 4, (32, 512, 64), 132)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    d, tokens, groups = 768, 32 * 512, 32 * 128
    found = case.backward()
    names = [launch.symbol.split("INS0_")[0] for launch in found]
    gradient = "weight_gradient_kernel"
    assert names == ["decompress_backward_kernel", gradient, gradient, "merge_backward_kernel",
                     gradient]  # fmt: skip
    of = {
        "decompress_backward_kernel": "DecompressBackwardParams",
        "merge_backward_kernel": "MergeBackwardParams",
        gradient: "WeightGradientParams",
    }
    for launch, name in zip(found, names, strict=True):
        more = 4 if name == gradient else 0  # the kernel's own second argument
        size = ctypes.sizeof(cuda_cases.structs()[of[name]])
        assert len(launch.arguments) == size + more
        assert launch.grid[0] * launch.grid[1] * launch.grid[2] >= 132 or name == gradient
    decompress, w1u, w2, merge, w_c = found
    assert decompress.moved > 2 * d * (tokens + 2 * groups) and merge.moved > 2 * d * 2 * tokens
    assert w1u.moved < w2.moved < w_c.moved
    normed = model == "t5-base"  # BERT's norm stands behind
    assert [launch.symbol[-2] for launch in (w1u, w2, w_c)] == ["0", "0", str(int(normed))]
