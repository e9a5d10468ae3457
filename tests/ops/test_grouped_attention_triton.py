"""grouped_attention's Triton kernels, on a GPU or interpreted."""

from __future__ import annotations

import pytest
import torch

from tests.ops.attention_cases import (
    KINDS,
    check_gradients,
    gradients,
    options,
    qkv,
    t5_table,
)
from tests.ops.cases import DTYPES, TRITON, assert_close, moved
from variator_kernels import functional as vf
from variator_kernels.ops.grouped_attention import LARGEST_HEAD
from variator_kernels.triton_kernels import launch

pytestmark = [
    pytest.mark.skipif(not TRITON.usable, reason=f"no Triton kernels: {TRITON.detail}"),
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (rows, queries, keys, heads, heads of keys, head size), as attention_cases.SHAPES and small enough
# for the interpreter, whose tiles have 32 rows and 32 keys.
SHAPES = [
    (2, 1, 1, 2, 2, 16),
    (1, 1, 37, 4, 2, 64),
    (2, 19, 10, 3, 3, 24),
    (1, 20, 70, 6, 2, 33),
    (2, 0, 4, 2, 2, 8),
    (2, 5, 0, 2, 2, 8),
    (0, 5, 3, 2, 2, 8),
    (1, 17, 33, 4, 1, 80),
    (1, 10, 20, 2, 1, 128),
]


def arguments(given):
    return {name: moved(value, "triton") for name, value in given.items()}


def run(inputs, backend, given, dtype=None):
    inputs = [moved(t if dtype is None else t.to(dtype), "triton") for t in inputs]
    with torch.no_grad():
        return vf.grouped_attention(*inputs, backend=backend, **arguments(given)).cpu()


def check(inputs, given, what, *, backward=True):
    truth = run(inputs, "reference", given, torch.double)
    out = run(inputs, "triton", given)
    assert out.dtype == inputs[0].dtype
    assert_close(out, run(inputs, "reference", given), truth, what)
    if not backward or out.numel() == 0:
        return
    d_out = torch.randn_like(truth).to(out.dtype)
    check_gradients(inputs, "triton", given, d_out, what)


@every_dtype
@every_kind
def test_numbers_and_gradients(dtype, kind):
    few = [*SHAPES[:4], SHAPES[7]] if dtype == torch.bfloat16 else SHAPES[:4]
    for shape in SHAPES if dtype == torch.float32 else few:
        check(qkv(shape, dtype), options(kind, shape), f"{kind} {shape}")


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 32, 33, 64, 65])
def test_numbers_of_keys_and_queries_beside_those_of_tiles(count):
    for shape in ((1, 17, count, 2, 1, 16), (1, count, 33, 3, 1, 8)):
        for kind in ("plain", "bias", "t5 attention"):
            check(qkv(shape), options(kind, shape), f"{kind} {shape}")


@pytest.mark.parametrize("d", [1, 2, 7, 15, 17, 48, 65, 96, 200, 256])
def test_head_sizes(d):
    shape = (1, 9, 20, 2, 1, d)
    check(qkv(shape), options("t5 attention", shape) | {"scale": d**-0.5}, str(shape))


def test_head_sizes_beyond_the_largest_are_refused():
    inputs = qkv((1, 3, 4, 1, 1, LARGEST_HEAD + 1))
    assert run(inputs, "auto", {}).isfinite().all()
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .* head sizes .*reference"):
        run(inputs, "triton", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bounds_within_and_between_tiles(dtype):
    shape = rows, n, count, *_ = (2, 90, 100, 2, 1, 16)
    inputs, steps = qkv(shape, dtype), torch.arange(count).expand(rows, count)
    for width in (1, 5, 40):
        check(inputs, {"first": steps, "last": steps + width}, f"a band of {width}")
    edges = torch.randint(-5, n + 5, (2, rows, count)).sort(0).values
    check(inputs, {"first": edges[0], "last": edges[1].int()}, "any bounds")
    check(inputs, {"first": steps * 2**40, "last": steps * 2**40 + 2**62}, "beyond 32 bits")
    check(inputs, options("t5 attention", shape) | {"first": steps}, "terms, biases and bounds")
    hidden = {"first": steps * 0 + n, "bias": torch.zeros(rows, count)}
    assert not run(inputs, "triton", hidden).any()
    assert not any(
        g.any() for g in gradients(inputs, "triton", hidden, torch.randn(inputs[0].shape))
    )


def test_tiles_that_nobody_sees_are_not_read():
    """Every second tile, more tiles than one look finds, and none at all."""
    settings = {name: launch.settings(name, arch=launch.arch(moved(torch.zeros(1), "triton")),
                                      d=16, terms=False)
                for name in ("attention_fp32", "attention_queries_fp32")}  # fmt: skip
    bn = max(row["bn"] for row in settings.values())
    shape = rows, n, count, *_ = (1, 6, 35 * bn, 1, 1, 8)
    q, k, v = qkv(shape)
    hidden = torch.arange(count) // bn % 2 == 1
    bounds = torch.where(hidden, 0, 3 * n)[None]
    given = {"last": bounds, "bias": torch.zeros(rows, count)}
    d_out = torch.randn(q.shape)
    clean, grads = run((q, k, v), "triton", given), gradients((q, k, v), "triton", given, d_out)
    check((q, k, v), given, "every second tile")
    k[:, hidden], v[:, hidden] = torch.nan, torch.nan
    assert torch.equal(run((q, k, v), "triton", given), clean)
    for found, expected in zip(gradients((q, k, v), "triton", given, d_out), grads, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_nobody_sees_may_be_anything(dtype):
    shape = (2, 20, 70, 4, 2, 24)
    (q, k, v), bias = qkv(shape, dtype), torch.zeros(2, 70)
    bias[:, 3:40] = bias[1, 60:] = -torch.inf
    given, d_out = {"bias": bias}, torch.randn(q.shape)
    clean, grads = run((q, k, v), "triton", given), gradients((q, k, v), "triton", given, d_out)
    for junk in (torch.nan, torch.inf, torch.finfo(dtype).max):
        k[:, 3:40], v[:, 3:40] = junk, -junk
        assert torch.equal(run((q, k, v), "triton", given), clean)
        for found, expected in zip(
            gradients((q, k, v), "triton", given, d_out), grads, strict=True
        ):
            assert torch.equal(found, expected)
    q[1, 3], k[0, 0, 0] = torch.nan, torch.nan  # of a query, and of a key that others see
    out = run((q, k, v), "triton", given)
    hurt = torch.zeros(2, 20, 4, dtype=torch.bool)
    hurt[1, 3] = hurt[0, :, :2] = True
    assert torch.equal(out.isnan().all(-1), hurt) and torch.equal(out[~hurt], clean[~hurt])


@pytest.mark.parametrize("place", ["key", "value", "query", "query and key"])
def test_infinite_numbers_act_as_in_plain_pytorch(place):
    q, k, v = (t.abs() + 0.1 for t in qkv((1, 40, 50, 4, 2, 16)))
    if "key" in place:
        k[0, 7, 1, 3] = -torch.inf  # a score of -inf: never seen
    if place == "value":
        v[0, 7, 0, 3] = torch.inf
    if "query" in place:
        q[0, 11, 1] = -torch.inf  # all scores are -inf: sees nobody
    expected = run((q, k, v), "reference", {})
    torch.testing.assert_close(run((q, k, v), "triton", {}), expected, equal_nan=True)


@pytest.mark.parametrize("step", [-40, -3, 3, 6.1, 300])
def test_scores_that_rise_from_tile_to_tile(step):
    count, d = 300, 8
    q, k, v = torch.ones(1, 20, 1, d), torch.randn(1, count, 1, d), torch.randn(1, count, 1, d)
    bias = (torch.arange(count) // 32 * float(step))[None]
    q[:, ::3] = -1
    check((q, k, v), {"bias": bias, "scale": 1.0}, f"by {step}")


def test_huge_scores():
    """Of a size at which a logarithm of their exponentials' sum would have no bits left."""
    q, k, v = qkv((2, 37, 50, 2, 2, 16))
    for factor in (30, 1e3, 1e18):
        out = run((factor * q, k, v), "triton", {"scale": 1.0})
        assert out.isfinite().all()
        if factor < 1e4:
            check((factor * q, k, v), {"scale": 1.0}, f"times {factor}", backward=False)
    check_large_gradients((30 * q, k, v))
    for low in (-1e9, torch.finfo(torch.float32).min / 4, torch.finfo(torch.float32).min):
        bias = torch.full((2, 50), low)  # a mask without -inf, and all of it masked
        mean = v.mean(1, keepdim=True).expand(2, 37, 2, 16)
        out = run((q * 1e-3, k, v), "triton", {"bias": bias})
        torch.testing.assert_close(out, mean, rtol=1e-2, atol=1e-2)
        bias[:, 20:] = 0
        check((q, k, v), {"bias": bias}, f"masked by {low}")


def check_large_gradients(inputs):
    """Where the two passes sum a product in other orders (BLAS decides, in the interpreter), they
    disagree about a score of hundreds by some units in its last place. A weight that plain PyTorch
    holds at exactly 1 is off by as much: the rule cannot hold."""
    q, k, _ = inputs
    given, d_out = {"scale": 1.0}, torch.randn_like(q)
    largest = torch.einsum("bnhd,bghd->bnhg", q, k).abs().max().item()
    units = 8 * torch.finfo(torch.float32).eps * largest
    truths = gradients(inputs, "reference", given, d_out, torch.double)
    for found, truth in zip(gradients(inputs, "triton", given, d_out), truths, strict=True):
        assert (found.double() - truth).abs().max() <= units * truth.abs().max()


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_positions(step):
    """In any order and type, doubled, far apart, beyond the table's ends, and none at all."""
    n, count, heads = 20, 40, 2
    inputs, keys = qkv((1, n, count, heads, heads, 8)), torch.arange(count)[None] * step
    table, steps = t5_table(heads), torch.arange(n)[None]
    for queries in (
        steps,
        steps.flip(1).int(),
        torch.randint(-5000, 5000, (1, n)),
        steps // 3 * 7,
        steps / 4 + 0.3,
        steps.double() / 3,
        steps / torch.where(steps == 3, 0, 1),
    ):
        for far in (0, 10**9, -(10**9)) if not queries.is_floating_point() else (0, 1000):
            relative = vf.distance_bias(table, queries=queries + far, keys=keys + far)
            check(inputs, {"relative": relative, "scale": 1.0}, f"{step} {far} {queries[0, :4]}",
                  backward=far == 0)  # fmt: skip


def test_means_fall_as_in_the_reference():
    """Distances that are halves, or not quite: fp64 decides, as in the reference."""
    means = torch.cat([torch.arange(20).double() / m for m in (1, 2, 3, 5, 6, 7)])[None]
    heads, n = 1, means.shape[1]
    table = torch.arange(32.0)[:, None] * 1e3  # a wrong bucket would be another key's weight
    relative = vf.distance_bias(table, queries=means, keys=means)
    q, k, v = qkv((1, n, n, heads, heads, 8))
    given = {"relative": relative, "scale": 1e-3}
    torch.testing.assert_close(run((q, k, v), "triton", given), run((q, k, v), "reference", given))


def test_patterns_beyond_the_table_give_nan_and_read_nothing_outside(monkeypatch):
    """On a device nobody can look at them before."""
    from variator_kernels.ops.grouped_attention import triton

    shape = (1, 7, 40, 2, 2, 8)
    inputs, given = qkv(shape), options("t5 attention_kv", shape)
    clean = run(inputs, "triton", given)
    relative = given["relative"]
    monkeypatch.setattr(triton, "check", lambda call: None)
    bias = torch.zeros(1, 40)
    bias[0, 5] = -torch.inf
    for wrong in (-1, relative.values.shape[0], 2**40, -(2**62)):
        pattern = relative.pattern.clone()
        pattern[0, 5] = wrong
        other = given | {"relative": relative._replace(pattern=pattern)}
        assert run(inputs, "triton", other).isnan().all()
        hidden = run(inputs, "triton", other | {"bias": bias})  # of a key that nobody sees
        assert hidden.isfinite().all() and not torch.equal(hidden, clean)


def test_strides():
    q, k, v = qkv((2, 25, 40, 4, 2, 24))
    expected = run((q, k, v), "triton", {})

    def views(t):
        yield t.transpose(1, 2).contiguous().transpose(1, 2)  # heads first
        yield t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)  # between two words
        yield torch.cat([t, t], 2)[:, :, : t.shape[2]]  # queries, keys and values in one tensor
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
        wide[..., ::2] = t
        yield wide[..., ::2]  # no unit stride
        yield t.flip(1).flip(1)

    d_out = torch.randn(q.shape).transpose(1, 2).contiguous().transpose(1, 2)
    plain = gradients((q, k, v), "triton", {}, d_out)
    for inputs in zip(views(q), views(k), views(v), strict=True):
        leaves = [moved(t, "triton") for t in inputs]
        assert torch.equal(vf.grouped_attention(*leaves, backend="triton").cpu(), expected)
        leaves = [t.requires_grad_() for t in leaves]
        out = vf.grouped_attention(*leaves, backend="triton")
        found = torch.autograd.grad(out, leaves, moved(d_out, "triton"))
        for a, b in zip(found, plain, strict=True):
            assert torch.equal(a.cpu(), b)
    one = [t[:1, :1].expand(2, 37, -1, -1) for t in (q, k, v)]
    check(one, {}, "expanded")
    # Lists of one row for all, and with steps between.
    table = t5_table(4)
    positions = torch.arange(50)[None, ::2].expand(2, 25)
    keys, bias = torch.arange(40)[None].expand(2, 40), torch.randn(1, 80)[:, ::2].expand(2, 40)
    relative = vf.distance_bias(table, queries=positions, keys=keys)
    last = torch.arange(5, 45)[None].expand(2, 40)
    check((q, k, v), {"relative": relative, "bias": bias, "last": last}, "expanded lists")


def test_types_of_bias_and_table():
    shape = (1, 9, 40, 2, 1, 8)
    inputs, given = qkv(shape), options("t5 attention", shape)
    for dtype in (torch.float64, torch.bfloat16):
        relative = given["relative"]
        terms = relative._replace(values=relative.values.to(dtype))
        other = given | {"bias": given["bias"].to(dtype), "relative": terms}
        check(inputs, other, str(dtype), backward=False)
