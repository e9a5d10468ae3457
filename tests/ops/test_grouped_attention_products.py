"""grouped_attention's products by instruction set: edges of tiles, what must not be read, and whose
tiles they are."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.ops.attention_cases import PATHS, expected_output, options, qkv, t5_table
from tests.ops.cases import CPU, DTYPES, ISAS, assert_close, kernels, needs_cpu  # noqa: F401
from variator_kernels import extension
from variator_kernels import functional as vf
from variator_kernels.ops import rows_linear
from variator_kernels.ops.int8_linear import kernels as int8_kernels
from variator_kernels.ops.self_attention import Book, Scheme, Step

every_isa = pytest.mark.parametrize("kernels", ISAS, indirect=True)
every_dtype = pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
every_path = pytest.mark.parametrize("path", PATHS, indirect=True)
sixteen_bits = pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
INFO = Path("/proc/cpuinfo")
FLAGS = set(INFO.read_text().split()) if INFO.exists() else set()
needs_tiles = pytest.mark.skipif("amx" not in ISAS, reason=f"no tiles, only {ISAS}")


@torch.no_grad()
def run(inputs, backend, given, dtype=None):
    inputs = [t if dtype is None else t.to(dtype) for t in inputs]
    return vf.grouped_attention(*inputs, backend=backend, **given)


def check(inputs, given, what):
    truth, plain = expected_output(list(inputs), given)
    assert_close(run(inputs, "cpu", given), plain, truth, what)


@needs_cpu
def test_tiles_are_used_where_they_are():
    if not {"amx_bf16", "amx_int8", "amx_tile", "avx512_bf16"} <= FLAGS:
        pytest.skip("this processor has no tiles for bf16 and int8, or does not say so")
    if "amx" not in extension.build_info()["cpu"]["isa"]:
        pytest.skip("the compiler had no tiles")
    assert CPU.available_isas()[-1] == "amx"  # whatever the tests are asked to run


@needs_cpu
def test_slow_pairs_are_not_chosen():
    found = CPU.available_isas()
    if not INFO.exists() or "avx512_bf16" not in found:
        pytest.skip("no instruction for pairs here")
    slow = "GenuineIntel" in FLAGS
    assert (found.index("avx512_bf16") < found.index("avx512")) == slow


@every_path
@every_isa
@every_dtype
@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 32, 33, 64, 129, 255, 256, 257, 513])
def test_numbers_of_keys_beside_those_of_tiles(kernels, dtype, count, path):  # noqa: F811
    shape = (2, 21, count, 4, 2, 40)
    for kind in ("plain", "t5 attention_kv", "bias"):
        check(qkv(shape, dtype), options(kind, shape), f"{kind} {shape}")


@every_path
@every_isa
@every_dtype
@pytest.mark.parametrize("d", [1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 65, 80, 96, 200])
def test_head_sizes_beside_those_of_tiles(kernels, dtype, d, path):  # noqa: F811
    for shape in ((2, 1, 37, 2, 1, d), (1, 19, 70, 2, 2, d)):
        given = options("t5 attention", shape) | {"scale": d**-0.5}
        check(qkv(shape, dtype), given, str(shape))


@every_path
@every_isa
@every_dtype
@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 33, 48, 49, 127, 129, 193, 385])
def test_numbers_of_queries_beside_those_of_blocks(kernels, dtype, n, path):  # noqa: F811
    shape = (1, n, 140, 2, 1, 16)
    for kind in ("plain", "causal", "window"):
        check(qkv(shape, dtype), options(kind, shape), f"{kind} {shape}")


@every_path
@every_isa
@every_dtype
def test_bounds_within_and_between_tiles(kernels, dtype, path):  # noqa: F811
    shape = rows, n, count, *_ = (2, 300, 300, 2, 2, 24)
    inputs, steps = qkv(shape, dtype), torch.arange(count).expand(rows, count)
    for width in (1, 5, 40, 128, 200):
        check(inputs, {"first": steps, "last": steps + width}, f"a band of {width}")
    edges = torch.randint(-5, n + 5, (2, rows, count)).sort(0).values
    check(inputs, {"first": edges[0], "last": edges[1]}, "any bounds")
    both = options("t5 attention", shape) | {"first": steps}
    check(inputs, both, "terms, biases and bounds")


@every_path
@every_isa
@every_dtype
def test_what_nobody_sees_may_be_anything(kernels, dtype, path):  # noqa: F811
    shape = (2, 70, 150, 4, 2, 40)
    (q, k, v), bias = qkv(shape, dtype), torch.zeros(2, 150)
    bias[:, 3:60] = bias[1, 100:] = -torch.inf
    clean = run((q, k, v), "cpu", {"bias": bias})
    for junk in (torch.nan, torch.inf, torch.finfo(dtype).max):
        k[:, 3:60], v[:, 3:60] = junk, -junk
        assert torch.equal(run((q, k, v), "cpu", {"bias": bias}), clean)
    q[1, 3], k[0, 0, 0] = torch.nan, torch.nan  # of a query, and of a key that others see
    out = run((q, k, v), "cpu", {"bias": bias})
    hurt = torch.zeros(2, 70, 4, dtype=torch.bool)
    hurt[1, 3] = hurt[0, :, :2] = True
    assert torch.equal(out.isnan().all(-1), hurt) and torch.equal(out[~hurt], clean[~hurt])


@every_path
@every_isa
@every_dtype
@pytest.mark.parametrize("place", ["key", "value", "query", "query and key"])
def test_infinite_numbers_act_as_in_plain_pytorch(kernels, dtype, place, path):  # noqa: F811
    q, k, v = (t.abs() + 0.1 for t in qkv((1, 40, 50, 4, 2, 16), dtype))
    if "key" in place:
        k[0, 7, 1, 3] = -torch.inf  # a score of -inf: never seen
    if place == "value":
        v[0, 7, 0, 3] = torch.inf
    if "query" in place:
        q[0, 11, 1] = -torch.inf  # all scores are -inf: sees nobody
    expected = run((q, k, v), "reference", {})
    torch.testing.assert_close(run((q, k, v), "cpu", {}), expected, equal_nan=True)


@every_path
@every_isa
@every_dtype
def test_strides(kernels, dtype, path):  # noqa: F811
    q, k, v = qkv((2, 45, 70, 4, 2, 40), dtype)
    expected = run((q, k, v), "cpu", {})

    def views(t):
        yield t.transpose(1, 2).contiguous().transpose(1, 2)  # heads first
        yield t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)  # between two words
        yield torch.cat([t, t], 2)[:, :, : t.shape[2]]  # queries, keys and values in one tensor
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
        wide[..., ::2] = t
        yield wide[..., ::2]  # no unit stride
        yield t.flip(1).flip(1)

    for inputs in zip(views(q), views(k), views(v), strict=True):
        assert torch.equal(run(inputs, "cpu", {}), expected)
    one = [t[:1, :1].expand(2, 37, -1, -1) for t in (q, k, v)]
    check(one, {}, "expanded")


@every_path
@every_isa
@every_dtype
@pytest.mark.parametrize("step", [-40, -3, 3, 5.9, 6.1, 40, 300])
def test_scores_that_rise_from_tile_to_tile(kernels, dtype, step, path):  # noqa: F811
    """A weight is relative to a score that need not be the largest."""
    n, count, d = 20, 1100, 8
    q, k, v = torch.ones(1, n, 1, d), torch.randn(1, count, 1, d), torch.randn(1, count, 1, d)
    bias = (torch.arange(count) // 64 * float(step))[None]
    q[:, ::3] = -1
    check([t.to(dtype) for t in (q, k, v)], {"bias": bias, "scale": 1.0}, f"by {step}")


@every_path
@every_isa
@every_dtype
def test_threads_change_nothing(kernels, dtype, path):  # noqa: F811
    before, found = torch.get_num_threads(), []
    shape = (2, 300, 140, 6, 3, 40)
    inputs, given = qkv(shape, dtype), options("t5 attention_kv", shape)
    inputs[1][0, 5, 1, 2] = torch.inf if dtype == torch.float16 else 1
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(inputs, "cpu", given))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=0, equal_nan=True)


@every_path
@every_isa
@pytest.mark.parametrize("step", [1, 2, 3, 5, 1000])
def test_steps_of_keys_and_of_queries(kernels, step, path):  # noqa: F811
    """Distances by steps: queries in any order, doubled, far apart, and beyond the table's ends."""
    n, count, heads = 50, 60, 2
    inputs, keys = qkv((1, n, count, heads, heads, 8)), torch.arange(count)[None] * step
    table = t5_table(heads)
    for queries in (
        torch.arange(n)[None],
        torch.arange(n)[None].flip(1),
        torch.randint(-5000, 5000, (1, n)),
        torch.arange(n)[None] // 3 * 7,
        torch.arange(n)[None] / 4 + 0.3,
    ):
        relative = vf.distance_bias(table, queries=queries, keys=keys)
        check(inputs, {"relative": relative, "scale": 1.0}, f"{step} {queries[0, :4].tolist()}")


@needs_tiles
@sixteen_bits
@pytest.mark.usefixtures("threads")
def test_the_librarys_tiles_stay_as_they_are(dtype):
    """oneDNN's products before, after and beside ours, in the same threads and in others."""
    before = CPU.active_isa()
    CPU.set_isa("amx")
    try:
        inputs = qkv((2, 70, 90, 4, 4, 64), dtype)
        a, b = torch.randn(96, 160).to(dtype), torch.randn(160, 224).to(dtype)
        plain = [t.transpose(1, 2) for t in inputs]
        weight = nn.Parameter(b.t().contiguous(), requires_grad=False)
        int8 = int8_kernels.own("amx").round_and_pack(weight, None)
        own = rows_linear.stacked((weight,), (None,), dtype, "amx")

        def everything():
            return (
                a @ b,
                run(inputs, "cpu", {}),
                int8.multiply(a, "none"),
                own(a),
                F.scaled_dot_product_attention(*plain),
                F.linear(a, b.t()),
                run(inputs, "cpu", {"scale": 2.0}),
                a @ b,
            )

        expected, wrong = everything(), []

        def many():
            for _ in range(20):
                if not all(map(torch.equal, everything(), expected)):
                    wrong.append(threading.get_ident())

        workers = [threading.Thread(target=many) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong
    finally:
        CPU.set_isa(before)


@every_isa
@every_dtype
@pytest.mark.parametrize(("n", "window"), [(700, 64), (391, 1), (300, 150)])
def test_windows_of_few_keys(kernels, dtype, n, window):  # noqa: F811
    """A query sees a small part of a tile: no other part may count, nor one be left out."""
    step = Step(
        Scheme(4, window, 3), Book.empty(2, torch.device("cpu")), None, torch.arange(n)[None]
    )
    given = {"bias": step.bias, "first": step.first, "last": step.last}
    inputs = qkv((2, n, n + step.groups, 4, 2, 24), dtype)
    check(inputs, given, f"n={n}, window={window}")
