"""What only a GPU can show of the CUDA backend. Shapes, dtypes, masks: tests/ops, tests/cuda."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch

from tests.gpu.test_triton import SIZES, layer, on_gpu
from tests.ops.cases import CUDA, GPU, assert_close, cast, masked
from tests.ops.test_backward import gradients
from variator_kernels import functional as vf
from variator_kernels.ops.compressed_ffn import cuda as sublayer
from variator_kernels.ops.feed_forward import activate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (GPU and CUDA.usable), reason=f"no GPU: {CUDA.detail}"),
]


@pytest.fixture(params=["one launch", "launches"])
def way(request, monkeypatch):
    limit = 10**9 if request.param == "one launch" else 0
    monkeypatch.setattr(sublayer, "ONE_LAUNCH_GROUPS", limit)


def run(x, p, ffn, backend="cuda", **options):
    with torch.no_grad():
        return vf.compressed_ffn(x, p, ffn, backend=backend, **options)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("k", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_sizes(way, name, k, dtype):
    d, f, kind = SIZES[name]
    x, p, ffn = layer(d, f, k, dtype, kind, rows=2, n=517)
    (mask,) = on_gpu(masked("left", 2, 517))
    truth = run(x.double(), cast(p, torch.double), cast(ffn, torch.double), "reference", mask=mask)
    plain = run(x, p, ffn, "reference", mask=mask)
    assert_close(run(x, p, ffn, mask=mask), plain, truth, f"{name} k={k}")


def nothing(x):
    return x


@pytest.mark.parametrize("rows", [1, 40, 128, 129, 4096, 5000])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(3072, 768), (768, 3072), (200, 8)])
def test_products(rows, activation, dtype, size):
    """Every tile and epilogue of the matrix products; poisoned outputs."""
    a, w = (torch.randn(n, size[1], device="cuda").to(dtype) for n in (rows, size[0]))
    w = w * size[1] ** -0.5
    bias, factor = (torch.randn(*s, size[0], device="cuda").to(dtype) for s in ((), (rows,)))
    act = functools.partial(activate, activation=activation) if activation != "none" else nothing

    def plain(t, with_bias, with_factor):
        b = bias.to(t) if with_bias else None
        out = act(torch.nn.functional.linear(a.to(t), w.to(t), b))
        return out * factor.to(t) if with_factor else out

    for with_bias, with_factor in ((False, False), (True, False), (True, True), (False, True)):
        out = sublayer.linear(
            a, w, bias if with_bias else None, activation, factor if with_factor else None
        )
        assert_close(
            out,
            plain(dtype, with_bias, with_factor),
            plain(torch.float64, with_bias, with_factor),
            f"{rows} {size} {activation}",
        )


def test_a_nan_passes_every_epilogue():
    a = torch.randn(5, 64, device="cuda", dtype=torch.bfloat16)
    a[2, 3] = float("nan")
    w = torch.randn(72, 64, device="cuda", dtype=torch.bfloat16)
    for activation in ("none", "relu", "gelu", "gelu_tanh", "silu"):
        out = sublayer.linear(a, w, None, activation)
        assert out[2].isnan().all() and out.isnan().sum() == out.shape[1]


@pytest.mark.parametrize("kind", ["t5", "bert", "v1.1"])
@pytest.mark.parametrize("mask_kind", ["none", "right"])
def test_graph_capture_and_replay(way, kind, mask_kind):
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


def test_no_synchronisation(way):
    x, p, ffn = layer()
    mask, cu = masked("left", *x.shape[:2]).cuda(), torch.tensor([0, 100, 520], device="cuda")
    run(x, p, ffn, mask=mask)
    run(x.view(-1, 768), p, ffn, cu_seqlens=cu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, p, ffn, mask=mask)
        run(x.view(-1, 768), p, ffn, cu_seqlens=cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_side_by_side(way):
    layers = [layer(kind=kind) for kind in ("t5", "bert", "v1.1", "t5")]
    expected = [run(*each) for each in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, each in zip(streams, layers, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(*each))
        torch.cuda.synchronize()
        for out, want in zip(found, expected, strict=True):
            assert torch.equal(out, want)


def test_the_same_input_gives_the_same_bits(way):
    x, p, ffn = layer(kind="v1.1")
    dy = torch.randn_like(x)
    first, grads = run(x, p, ffn), gradients(x, p, ffn, x.dtype, "cuda", dy)
    for _ in range(5):
        assert torch.equal(run(x, p, ffn), first)
        again = gradients(x, p, ffn, x.dtype, "cuda", dy)
        assert all(torch.equal(grads[name], again[name]) for name in grads)


def test_another_device_than_the_current(way):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, p, ffn = layer()
    expected = run(x, p, ffn)
    there = [type(v)(*(t.to("cuda:1") if isinstance(t, torch.Tensor) else t for t in v))
             for v in (p, ffn)]  # fmt: skip
    assert torch.equal(run(x.to("cuda:1"), *there).to(x.device), expected)
    assert torch.cuda.current_device() == 0


def test_a_fork_after_the_import_has_the_gpu():
    """Importing the package initialises nothing that a forked process would then be without."""
    script = (
        "import os, torch, variator_kernels\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(int(torch.ones(2, device='cuda').sum().item()) - 2)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_compiles_whole():
    x, p, ffn = layer()
    whole = torch.compile(lambda x: 2 * run(x, p, ffn), fullgraph=True)
    assert torch.equal(whole(x), 2 * run(x, p, ffn))
