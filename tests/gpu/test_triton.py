"""What only a GPU can show of the Triton backend. Shapes, dtypes, masks: tests/ops on a GPU."""

from __future__ import annotations

import pytest
import torch

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
