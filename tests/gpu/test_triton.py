"""What only a GPU can show of the Triton backend. Shapes, dtypes, masks: tests/ops on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.ops.attention_cases import KINDS, options, qkv
from tests.ops.cases import GPU, TRITON, assert_close, cast, feed_forward, masked, plugin
from tests.ops.test_backward import gradients, leaves
from variator_kernels import backends
from variator_kernels import functional as vf

REASON = f"needs a GPU: {TRITON.detail}"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (GPU and TRITON.usable), reason=REASON)]
SIZES = {
    "t5-base": (768, 3072, "t5"),
    "bert-base": (768, 3072, "bert"),
    "t5-v1.1-large": (1024, 2816, "v1.1"),
    "llama": (4096, 11008, "v1.1"),
}


def on_gpu(*values):
    def move(value):
        if isinstance(value, torch.Tensor):
            return value.cuda()
        if isinstance(value, tuple):
            return type(value)(*map(move, value))
        return value

    return [move(value) for value in values]


def layer(d=768, f=3072, k=4, dtype=torch.bfloat16, kind="t5", rows=4, n=130):
    p, ffn, x = plugin(d, k, 64, dtype), feed_forward(d, f, dtype, kind), torch.randn(rows, n, d)
    return on_gpu(x.to(dtype), p, ffn)


def run(x, p, ffn, **options):
    with torch.no_grad():
        return vf.compressed_ffn(x, p, ffn, backend=options.pop("backend", "triton"), **options)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "k, dtype",
    [*((k, torch.bfloat16) for k in (2, 4, 8, 16, 32)), (4, torch.float16), (4, torch.float32)],
)
def test_real_sizes(name, k, dtype):
    d, f, kind = SIZES[name]
    x, p, ffn = layer(d, f, k, dtype, kind, rows=2, n=517)
    (mask,) = on_gpu(masked("left", 2, 517))
    truth = run(x.double(), cast(p, torch.double), cast(ffn, torch.double), mask=mask,
                backend="reference")  # fmt: skip
    plain = run(x, p, ffn, mask=mask, backend="reference")
    assert_close(run(x, p, ffn, mask=mask), plain, truth, f"{name} k={k}")


@pytest.mark.parametrize("kind", ["t5", "bert", "v1.1"])
@pytest.mark.parametrize("mask_kind", ["none", "right"])
def test_graph_capture_and_replay(kind, mask_kind):
    x, p, ffn = layer(kind=kind)
    mask = masked(mask_kind, *x.shape[:2])
    mask = None if mask is None else mask.cuda()
    static = x.clone()
    run(static, p, ffn, mask=mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(static, p, ffn, mask=mask)
    for _ in range(3):
        static.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, run(static, p, ffn, mask=mask))


def test_packed_input_in_a_graph():
    """The offsets may change between replays: no size depends on them."""
    x, p, ffn = layer()
    flat = x.view(-1, x.shape[-1])
    cu = torch.tensor([0, 100, 100, 321, 520], dtype=torch.int32, device="cuda")
    run(flat, p, ffn, cu_seqlens=cu)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(flat, p, ffn, cu_seqlens=cu)
    cu.copy_(torch.tensor([3, 77, 200, 201, 519]))
    graph.replay()
    assert torch.equal(y, run(flat, p, ffn, cu_seqlens=cu))
    assert torch.equal(y[:3], flat[:3]) and torch.equal(y[519:], flat[519:])


def test_no_synchronisation():
    x, p, ffn = layer()
    mask = masked("left", *x.shape[:2]).cuda()
    cu = torch.tensor([0, 100, 520], device="cuda")
    run(x, p, ffn, mask=mask)
    run(x.view(-1, 768), p, ffn, cu_seqlens=cu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, p, ffn, mask=mask)
        run(x.view(-1, 768), p, ffn, cu_seqlens=cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream():
    x, p, ffn = layer()
    expected = run(x, p, ffn)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = run(late, p, ffn)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_the_same_every_time():
    x, p, ffn = layer(dtype=torch.bfloat16, rows=8, n=512)
    dy = torch.randn_like(x)
    first, grads = run(x, p, ffn), gradients(x, p, ffn, x.dtype, "triton", dy)
    for _ in range(5):
        assert torch.equal(run(x, p, ffn), first)
        again = gradients(x, p, ffn, x.dtype, "triton", dy)
        assert all(torch.equal(grads[name], again[name]) for name in grads)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole(training):
    x, p, ffn = layer(dtype=torch.float32)
    p = leaves(p) if training else p
    x.requires_grad_(training)

    def sublayer(x):
        return 2 * vf.compressed_ffn(x, p, ffn, backend="triton")

    whole = torch.compile(sublayer, fullgraph=True)
    torch.testing.assert_close(whole(x), sublayer(x), rtol=1e-4, atol=1e-4)
    if training:
        for a, b in zip(
            torch.autograd.grad(whole(x).sum(), p[:6]),
            torch.autograd.grad(sublayer(x).sum(), p[:6]),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_dispatch():
    x, _, _ = layer(rows=1, n=8)
    assert backends.resolve("auto", x) in [*backends._proven_for(x), "reference"]
    assert backends.resolve("triton", x) == "triton"
    with pytest.raises(ValueError, match="backend 'cpu' cannot run here"):
        backends.resolve("cpu", x)
    with pytest.raises(ValueError, match="expected one of"):
        backends.resolve("triton", x.double())


def test_another_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, p, ffn = layer()
    expected = run(x, p, ffn)
    there = [type(v)(*(t.to("cuda:1") if isinstance(t, torch.Tensor) else t for t in v))
             for v in (p, ffn)]  # fmt: skip
    assert torch.equal(run(x.to("cuda:1"), *there).to(x.device), expected)


# (rows, queries, keys, heads, heads of keys, head size)
ATTENTIONS = {
    "t5-base": (4, 512, 128, 12, 12, 64),
    "long": (1, 2048, 512, 4, 4, 64),
    "llama": (1, 700, 300, 8, 8, 128),
    "decoding": (3, 1, 1100, 32, 8, 128),
    "80": (2, 130, 67, 6, 3, 80),
    "256": (1, 130, 200, 2, 1, 256),
}


def attention(inputs, given, backend, d_out):
    """The output, and gradients of queries, keys, values and of a bias that is given."""
    names = ["queries", "keys", "values", *(["bias"] if "bias" in given else [])]
    leaves = dict(zip(names, (t.detach().clone().requires_grad_() for t in inputs), strict=True))
    out = vf.grouped_attention(**{**given, **leaves}, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), d_out.to(out.dtype))]


def attention_case(name, kind, dtype):
    shape = ATTENTIONS[name]
    inputs, given = qkv(shape, dtype), options(kind, shape)
    if kind == "bias":  # row 0 is a row without a visible key, where there are others
        given["bias"][0] = torch.randn(shape[2]) if shape[0] == 1 else given["bias"][0]
    given = dict(zip(given, on_gpu(*given.values()), strict=True))
    inputs = [*on_gpu(*inputs), *([given["bias"]] if "bias" in given else [])]
    return inputs, given, torch.randn(inputs[0].shape, device="cuda")


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_attention_of_real_sizes(name, kind, dtype):
    inputs, given, d_out = attention_case(name, kind, dtype)
    d_out = d_out.to(dtype)
    found = attention(inputs, given, "triton", d_out)
    plain = attention(inputs, given, "reference", d_out)
    truth = attention([t.double() for t in inputs], given, "reference", d_out.double())
    assert_close(found[0], plain[0], truth[0], f"{name} {kind}")
    for out, near, right in zip(found[1:], plain[1:], truth[1:], strict=True):
        assert not out.isnan().any()
        error, allowed = ((t.double() - right).square().mean().sqrt() for t in (out, near))
        assert error <= 2 * allowed + 1e-6, f"{name} {kind}: {error}, allowed {allowed}"


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_the_same_every_time(kind):
    inputs, given, d_out = attention_case("t5-base", kind, torch.bfloat16)
    first = attention(inputs, given, "triton", d_out)
    for _ in range(5):
        assert all(map(torch.equal, attention(inputs, given, "triton", d_out), first))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_in_a_graph_and_without_synchronisation(kind):
    inputs, given, _ = attention_case("t5-base", kind, torch.bfloat16)
    queries, keys, values = inputs[:3]

    def attend():
        with torch.no_grad():
            return vf.grouped_attention(queries, keys, values, backend="triton", **given)

    attend()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attend()
    for _ in range(3):
        queries.copy_(torch.randn_like(queries))
        graph.replay()
        assert torch.equal(y, attend())


def test_attention_makes_nothing_of_queries_times_keys():
    inputs, given, _ = attention_case("long", "t5 attention_kv", torch.bfloat16)
    with torch.no_grad():
        vf.grouped_attention(*inputs, backend="triton", **given)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        vf.grouped_attention(*inputs, backend="triton", **given)
    _, n, count, heads, _, _ = ATTENTIONS["long"]
    assert torch.cuda.max_memory_allocated() - before < heads * n * count


def test_attention_that_auto_takes():
    inputs, _, _ = attention_case("t5-base", "bias", torch.bfloat16)
    proven = "triton" in backends._proven_for(inputs[0])
    from variator_kernels.ops.grouped_attention import _backend

    assert (_backend("auto", inputs[0], None, 0.0) == "triton") == proven
