"""grouped_attention: what correct means, every kernel against it, and what stands in between."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from tests.ops.attention_cases import (
    KINDS,
    PATHS,
    SHAPES,
    expected_output,
    of_tokens,
    options,
    qkv,
    t5_table,
)
from tests.ops.cases import (
    DTYPES,
    ISAS,
    MASKS,
    assert_close,
    kernels,  # noqa: F401  (fixture)
    moved,
    needs_cpu,
    on_triton,
)
from variator_kernels import functional as vf
from variator_kernels.ops.groups import NOTHING_KEPT, Keep

every_isa = pytest.mark.parametrize("kernels", ISAS, indirect=True)
every_backend = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpu", marks=needs_cpu)]
)
every_path = pytest.mark.parametrize("path", PATHS, indirect=True)
# The path is the CPU kernel's alone: nothing else runs twice for it.
EVERY_WAY = [
    ("reference", "packed"),
    *(pytest.param("cpu", path, marks=needs_cpu) for path in PATHS),
]
every_way = pytest.mark.parametrize(("backend", "path"), EVERY_WAY, indirect=["path"])
and_triton = pytest.mark.parametrize(
    ("backend", "path"),
    [*EVERY_WAY, pytest.param("triton", "packed", marks=list(on_triton.marks))],
    indirect=["path"],
)
every_kind = pytest.mark.parametrize("kind", KINDS)


def run(inputs, backend, given, dtype=None):
    with torch.no_grad():
        inputs = [moved(t if dtype is None else t.to(dtype), backend) for t in inputs]
        given = {name: moved(value, backend) for name, value in given.items()}
        return vf.grouped_attention(*inputs, backend=backend, **given).to("cpu")


@every_path
@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_forward(kernels, dtype, kind, path):  # noqa: F811
    for shape in SHAPES:
        inputs, given = qkv(shape, dtype), options(kind, shape)
        truth, plain = expected_output(inputs, given)
        out = run(inputs, kernels, given)
        assert out.dtype == dtype
        assert_close(out, plain, truth, f"{kind} {shape}")


@every_way
@pytest.mark.parametrize("kept", [NOTHING_KEPT, Keep(2, 1)], ids=["merged", "kept"])
@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("ratio", [1, 2, 4, 5])
def test_a_key_weighs_as_much_as_the_tokens_it_stands_for(backend, ratio, mask_kind, kept, path):
    """Groups whose tokens have one key and one value: attention_kv is attention over the tokens."""
    rows, n, heads, d = 2, 40, 3, 8
    made = of_tokens(mask_kind, rows, n, max(ratio, 2), kept)
    if ratio == 1:
        made = of_tokens(mask_kind, rows, n, 2, Keep(n))  # every token kept: groups of one
    q, table = torch.randn(rows, n, heads, d).double(), t5_table(heads).double()
    keys, values = (torch.randn(*made["start"].shape, heads, d).double() for _ in range(2))
    members, mask = made["members"], made["mask"]
    positions = torch.arange(n).expand(rows, n)
    place = {"queries": positions, "keys": made["start"], "members": members}
    of_token = torch.zeros(rows * n, dtype=torch.long)
    group = torch.arange(keys.shape[0] * keys.shape[1]).view(*keys.shape[:2], 1).expand_as(members)
    of_token[made["index"][members]] = group[members]
    k, v = (t.flatten(0, 1)[of_token].view(rows, n, heads, d) for t in (keys, values))
    distance = torch.arange(n) - torch.arange(n)[:, None]
    for window in (None, (3, 5)):
        term = table[buckets(distance)].permute(2, 0, 1)
        hidden = ~mask[:, None, None].expand(rows, 1, n, n)
        if window:
            hidden = hidden | (distance < -window[0]) | (distance > window[1])
        additive = (term[None] * 1.0).expand(rows, -1, -1, -1).masked_fill(hidden, -torch.inf)
        expected = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), additive, scale=1.0
        ).transpose(1, 2)
        expected = torch.where(hidden.all(-1)[:, 0, :, None, None], 0, expected)
        relative = vf.distance_bias(table, window=window, **place)
        out = run((q, keys, values), backend, {"relative": relative, "scale": 1.0})
        torch.testing.assert_close(out, expected)
    bias = members.sum(-1).double().log()  # no positions: BERT
    without = run((q, keys, values), backend, {"bias": bias})
    relative = vf.distance_bias(None, **place)
    torch.testing.assert_close(without, run((q, keys, values), backend, {"relative": relative}))


def buckets(distance):
    """T5's, in a plain formula of its own: 32, bidirectional, 128."""
    far = 8 + (torch.log(distance.abs().clamp_min(1) / 8) / torch.log(torch.tensor(16.0)) * 8)
    bucket = torch.where(distance.abs() < 8, distance.abs(), far.long().clamp(max=15))
    return bucket + 16 * (distance > 0)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_ratio_1_is_the_attention_of_t5(bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    rows, n, heads, d = 2, 300, 2, 8
    distance = torch.arange(n) - torch.arange(n)[:, None]
    table = t5_table(heads)
    found = t5.T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
    term = table[found].permute(2, 0, 1)[None]
    q, k, v = qkv((rows, n, n, heads, heads, d))
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), term, scale=1.0
    )
    positions = torch.arange(n).expand(rows, n)
    relative = vf.distance_bias(
        table, queries=positions, keys=positions, bidirectional=bidirectional
    )
    for backend in ("reference", "auto"):
        out = run((q, k, v), backend, {"relative": relative, "scale": 1.0})
        torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


@and_triton
@pytest.mark.parametrize("window", [0, 1, 3, 8, 100])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_a_decoder_sees_what_the_specification_says(backend, ratio, window, path):
    """Kept keys, merged keys of whole groups that left the window, plain keys behind them."""
    kept, n = 2, 23
    t = torch.arange(n - kept)
    edge = (torch.arange(len(t) // ratio + 1) + 1) * ratio + max(window - 1, 0)
    groups = len(t) // ratio
    first = torch.cat([torch.arange(kept), edge[:groups] + kept, t + kept])
    last = torch.cat([torch.full((kept + groups,), n), edge[t // ratio] + kept])
    count = len(first)
    q, k, _ = qkv((1, n, count, 1, 1, 4), torch.double)
    v = torch.eye(count).double().view(1, count, 1, count)[..., :count]
    q, k = (F.pad(x, (0, count - 4)) for x in (q, k))
    given = {"first": first[None], "last": last[None]}
    weights = run((q, k, v), backend, given)[0, :, 0]
    for query in range(n):
        s = query - kept
        merged = min(max(0, s + 1 - window) // ratio, max(s, 0) // ratio)
        seen = [i for i in range(kept) if i <= query]
        seen += [kept + i for i in range(merged)]
        seen += [kept + groups + i for i in range(merged * ratio, s + 1)]
        assert (weights[query] > 0).nonzero().flatten().tolist() == seen, query


@every_path
@every_isa
def test_huge_logits_and_far_positions(kernels, path):  # noqa: F811
    q, k, v = qkv((2, 37, 50, 2, 2, 16))
    for factor in (30, 1e4, 1e18):
        truth = run((factor * q, k, v), "reference", {"scale": 1.0}, torch.double)
        out = run((factor * q, k, v), kernels, {"scale": 1.0})
        assert out.isfinite().all()
        if factor < 1e4:
            plain = run((factor * q, k, v), "reference", {"scale": 1.0})
            assert_close(out, plain, truth)
    table = t5_table(2)
    for base in (0, 10**6, -(10**9)):
        positions = torch.arange(37).expand(2, 37) + base
        keys = torch.randint(-(10**6), 10**6, (2, 50)) + base
        keys[:, 20:40] = torch.arange(20) * 3 + base
        given = {"relative": vf.distance_bias(table, queries=positions, keys=keys), "scale": 1.0}
        truth = run((q, k, v), "reference", given, torch.double)
        out = run((q, k, v), kernels, given)
        assert_close(out, run((q, k, v), "reference", given), truth)


@and_triton
def test_nan_of_invisible_keys_and_other_rows_harms_nothing(backend, path):
    shape = (3, 20, 40, 2, 2, 16)
    (q, k, v), bias = qkv(shape), torch.zeros(3, 40)
    bias[:, 7:30] = -torch.inf
    clean = run((q, k, v), backend, {"bias": bias})
    k[:, 7:30], v[:, 7:30] = torch.nan, torch.inf
    assert torch.equal(run((q, k, v), backend, {"bias": bias}), clean)
    q[1, 3] = torch.nan
    out = run((q, k, v), backend, {"bias": bias})
    assert out[1, 3].isnan().all()
    out[1, 3] = clean[1, 3]
    assert torch.equal(out, clean)


@every_way
def test_memory_layouts(backend, path):
    q, k, v = qkv((2, 21, 30, 4, 2, 16))
    expected = run((q, k, v), backend, {})

    def views(t):
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
        wide[..., ::2] = t
        yield wide[..., ::2]
        yield t.transpose(1, 2).contiguous().transpose(1, 2)
        yield t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)
        yield torch.cat([t, t], 2)[:, :, : t.shape[2]]

    for a, b, c in zip(views(q), views(k), views(v), strict=True):
        torch.testing.assert_close(run((a, b, c), backend, {}), expected)
    one = [t[:1].expand(2, -1, -1, -1) for t in (q, k, v)]
    torch.testing.assert_close(run(one, backend, {}), expected[:1].expand_as(expected))


@every_path
@needs_cpu
def test_threads_change_nothing(path):
    shape = (2, 130, 70, 6, 3, 32)
    inputs, given = qkv(shape), options("t5 attention_kv", shape)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(inputs, "cpu", given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.skipif(importlib.util.find_spec("expecttest") is None, reason="needs expecttest")
@needs_cpu
@every_kind
def test_opcheck(kind):
    shape = (2, 19, 12, 4, 2, 16)
    inputs, given = [t.requires_grad_() for t in qkv(shape)], options(kind, shape)
    visible = [given.get(name) for name in ("bias", "first", "last")]
    relative = given.get("relative") or (None,) * 4 + (0,)
    arguments = (*inputs, *visible, *relative, 0.3, "cpu")
    torch.library.opcheck(torch.ops.variator.grouped_attention.default, arguments)


@every_backend
def test_compiles_whole(backend):
    torch._dynamo.reset()
    shape = (2, 19, 12, 4, 2, 16)
    inputs, given = qkv(shape), options("t5 attention_kv", shape)
    members = torch.rand(2, 12, 4) < 0.7
    table, positions = t5_table(4), torch.arange(19).expand(2, 19)
    starts = torch.arange(0, 48, 4).expand(2, 12)

    def layer(q, k, v):
        relative = vf.distance_bias(table, queries=positions, keys=starts, members=members)
        return vf.grouped_attention(q, k, v, relative=relative, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), layer(*inputs))
    assert given


def test_flops_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    from variator_kernels.ops import flop_formulas

    flop_formulas.register()
    shape = (2, 19, 12, 4, 4, 16)
    counts = []
    for backend in ("reference", "auto"):
        with FlopCounterMode(display=False) as counter:
            run(qkv(shape), backend, {})
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * flop_formulas.attention_macs(19, 12, 4 * 16)


@and_triton
def test_positions_that_are_no_numbers_harm_nobody_else(backend, path):
    """A group without a token: its mean position is 0 / 0, and nobody sees it or asks for it."""
    n, heads, d = 64, 2, 8
    q, k, v = (torch.randn(1, n, heads, d) for _ in range(3))
    means = torch.arange(float(n))[None] * 4 + 1.5
    bias = torch.zeros(1, n)
    bias[0, 10] = -torch.inf
    table, given = t5_table(heads), {"bias": bias, "scale": 1.0}
    whole = vf.distance_bias(table, queries=means, keys=means)
    expected = run((q, k, v), "reference", given | {"relative": whole}, torch.double)
    means = means.clone()
    means[0, 10] = torch.nan
    holed = vf.distance_bias(table, queries=means, keys=means)
    out = run((q, k, v), backend, given | {"relative": holed}).double()
    others = torch.arange(n) != 10
    torch.testing.assert_close(out[:, others], expected[:, others], rtol=1e-4, atol=1e-5)
    assert out.isfinite().all()


@every_backend
@pytest.mark.parametrize("bias", [-1e9, torch.finfo(torch.float32).min / 4])
def test_large_scores_have_right_gradients(backend, bias):
    """Masks of a large negative number in the place of -inf, a row of nothing else among them."""
    inputs = [t.requires_grad_() for t in qkv((2, 9, 5, 2, 2, 8))]
    masked = torch.zeros(2, 5)
    masked[0] = bias
    masked[1, 3:] = bias
    out = vf.grouped_attention(*inputs, bias=masked, backend=backend)
    gradients = torch.autograd.grad(out.sum(), inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    given = masked.double()
    given[0] = 0 if backend == "cpu" or bias < -1e10 else bias
    truth = vf.grouped_attention(*wide, bias=given, backend="reference")
    expected = torch.autograd.grad(truth.sum(), wide)
    # Row 0: the scores are lost in the bias's rounding, so its weights are all the same.
    torch.testing.assert_close(out[1].double(), truth[1], rtol=1e-5, atol=1e-5)
    assert gradients[2][0].sum() == pytest.approx(float(expected[2][0].sum()), rel=1e-3)
    for found, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found[1].double(), right[1], rtol=1e-4, atol=1e-5)


@every_backend
def test_autocast_changes_nothing(backend):
    inputs = [t.requires_grad_() for t in qkv((2, 9, 5, 4, 2, 8))]
    made = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = vf.grouped_attention(*inputs, backend=backend)
        made.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for plain, cast in zip(*made, strict=True):
        assert plain.dtype == cast.dtype == torch.float32
        torch.testing.assert_close(plain, cast)


@needs_cpu
def test_the_op_gives_its_output_alone():
    """Nothing that only a backward pass could read is made in inference."""
    inputs = qkv((2, 9, 5, 4, 2, 8))
    arguments = (*inputs, *(None,) * 7, 0, 0.3, "cpu")
    out = torch.ops.variator.grouped_attention.default(*arguments)
    torch.testing.assert_close(out, run(inputs, "reference", {"scale": 0.3}))
