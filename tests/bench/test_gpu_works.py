"""The launches that are predicted: what they are given, and counts by hand beside the figures."""

from __future__ import annotations

import ctypes
import json
import re
import struct
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench.tools import cuda_cases, cuda_products, predict_gpu
from bench.tools.gpu_bounds import CHIPS
from bench.tools.gpu_works import DESCRIPTOR, bank
from bench.tools.triton_cases import MODELS
from bench.tools.triton_compiler import Launched, parameters

CHIP = CHIPS["H200"]
ROWS = json.loads(predict_gpu.FIGURES.read_text())["rows"]


def case(model, k, size):
    try:
        return cuda_cases.Case(MODELS[model], k, size, CHIP.processors)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def figures(**wanted):
    return [row for row in ROWS if all(row[name] == value for name, value in wanted.items())]


def microseconds(flops):
    return flops / CHIP.tensor_flops_a_clock / CHIP.hertz * 1e6


@pytest.mark.parametrize("model", ["t5-base", "bert-base", "llama-7b"])
def test_one_launch_is_given_the_whole_sublayer(model):
    """Every tensor once: x and y, the FFN's weights, the plugin's, and what lies between."""
    of = case(model, 4, (1, 512, 64))
    d, f, n, groups, gated = MODELS[model].d, MODELS[model].f, 512, 128, MODELS[model].gated
    launch = cuda_products.one_launch(of)
    layer = cuda_cases.structs()["LayerParams"]
    assert len(launch.arguments) == ctypes.sizeof(layer)
    given = layer.from_buffer_copy(launch.arguments)
    assert given.decompress.residual == given.merge.x and given.decompress.u == given.u
    assert bool(given.w_gate) == gated and bool(given.b_in) == (model == "bert-base")
    weights = 2 * d * f * (2 + gated) + 2 * (4 * 4 * d + 3 * 64 * d)
    between = groups * (2 * d + 2 * f + 2 * d + 4 * given.splits * d) + 4 * 64 * n
    least = 2 * 2 * n * d + weights + between
    assert least < launch.moved < 1.005 * least
    assert 1 < launch.grid[0] <= CHIP.processors


def test_where_one_launch_is_chosen():
    assert cuda_products.one_launch_is_chosen(case("t5-base", 4, (2, 512, 64)))
    assert not cuda_products.one_launch_is_chosen(case("t5-base", 4, (4, 512, 64)))


def test_products_of_one_launch_by_hand():
    """T5-base, 128 groups: 96 tiles [64, 64] of the first product and 120 pieces of the second
    are one each to a block of 132; sums over 768 and, by five parts, over 640 columns. Merge and
    decompress add W_1h h of 32 rows, scores, sums of squares, W_1u u and W_2 t."""
    (row,) = figures(part="few", model="t5-base", k=4, kernel="one_launch_kernel")
    products = 2 * 64 * 64 * (768 + 640)
    assert microseconds(products) < row["tensor"] < microseconds(1.7 * products)


def test_cutlass_products_by_hand():
    """A multiprocessor's tiles times their FLOPs, and rows of 32 bytes a step of 16: two HGMMA read
    64 rows and a tile's columns, or one does, and TMA writes the rows of both operands."""
    found = [row for row in ROWS if row["kernel"].startswith("gemm_sm90")]
    wanted = {"gemm_sm90_128x256: 3072 x 768", "gemm_sm90_128x192: 768 x 3072"}
    t5 = {row["kernel"] for row in found if (row["model"], row["k"]) == ("t5-base", 4)}
    assert wanted <= t5
    for row in found:
        high, wide, columns, inner = map(int, re.findall(r"\d+", row["kernel"])[1:])
        tokens = 1
        for part in row["size"].split(" x "):
            tokens *= int(part)
        tiles = -(-tokens // row["k"] // high) * -(-columns // wide)
        each = -(-tiles // CHIP.processors)
        tensor = microseconds(each * 2 * high * wide * inner)
        assert row["blocks"] <= CHIP.processors
        assert row["tensor"] == pytest.approx(tensor, rel=2e-3, abs=0.01)
        steps = each * inner // 16 * (high // 64 * (64 + wide) + high + wide) * 32 / 128
        assert 1 < row["shared"] * CHIP.hertz / 1e6 / steps < 1.2


def test_parameters_with_descriptors():
    """128 bytes at a multiple of 64, then sizes and strides, each at a multiple of its size."""
    signature = {"rows": "i32", "a": "tensordesc<bf16[128, 64]>", "b": "i32", "out": "*bf16"}
    kernel = SimpleNamespace(fn=SimpleNamespace(arg_names=list(signature)), signature=signature)
    matrix = SimpleNamespace(shape=[4096, 768], strides=[768, 1])
    arguments = {"rows": 7, "a": matrix, "b": 5, "out": None}
    launched = Launched("product", SimpleNamespace(src=kernel), (132,), arguments)
    constants = bank(256, launched.grid, parameters(launched), DESCRIPTOR)
    assert struct.unpack_from("<6i", constants) == (256, 1, 1, 132, 1, 1)
    found = struct.unpack_from("<i60x128x2i2qi4xQ", constants, 0x240)
    assert found == (7, 4096, 768, 768, 1, 5, 0x7F0100000000)


def test_tritons_gradients_by_hand():
    """T5-base, k = 4: the bottleneck's gradient of 64 tokens and W_1u u of their 16 groups, twice
    a multiprocessor; W_1uᵀ times the bottleneck's gradient, spread evenly over 768 programs."""
    wanted = {"part": "backward", "backend": "triton", "model": "t5-base", "k": 4}
    (inner,) = figures(**wanted, kernel="inner_gradient_kernel")
    assert inner["tensor"] == round(microseconds(2 * 2 * (64 + 16) * 64 * 768), 2)
    (group,) = figures(**wanted, kernel="group_gradient_kernel")
    assert group["tensor"] == round(microseconds(6 * 2 * 4096 * 64 * 768 / 768), 2)
    # dy twice a layer: every token's row of the gradient is read by this kernel, and by that.
    least = 2 * 16384 * 768 / CHIP.bytes_a_second * 1e6
    assert least < inner["memory"] and least < group["memory"]
