"""Odd inputs and surroundings: memory layouts, NaN, threads, fork, errors."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from tests.ops.cases import (
    cast,
    every_kernel_backend,
    feed_forward,
    kernel_backends,
    masked,
    moved,
    needs_cpu,
    on_cuda,
    plugin,
)
from variator_kernels import extension
from variator_kernels import functional as vf
from variator_kernels.ops import listed
from variator_kernels.ops.make_groups import make_groups

D, K, N = 24, 4, 19
P = plugin(D, K, 8, torch.float32)
FFN = feed_forward(D, 40, torch.float32, "t5")


def run(x, **options):
    backend = options.pop("backend", "auto")
    x, p, ffn = moved((x, P, FFN), backend)
    options = {name: moved(value, backend) for name, value in options.items()}
    with torch.no_grad():
        return vf.compressed_ffn(x, p, ffn, backend=backend, **options).cpu()


@every_kernel_backend
def test_memory_layouts(backend):
    x = moved(torch.randn(3, N, D), backend)
    expected = run(x, backend=backend)

    def same(y):
        # Elsewhere a row's sums may depend on where it lies: a GPU's threads load other widths, and
        # the interpreter's GEMM is NumPy's, which adds up in another order at a tile's edge.
        exact = backend == "cpu"
        return torch.equal(y, expected) if exact else torch.allclose(y, expected, 1e-5, 1e-5)

    wide = x.new_zeros(3, N, 2 * D)
    wide[..., ::2] = x
    apart = x.new_zeros(3, N, D + 5)
    apart[..., :D] = x
    misaligned = x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    for name, view in {
        "inner stride 2": wide[..., ::2],
        "rows apart": apart[..., :D],
        "transposed batch": x.transpose(0, 1).contiguous().transpose(0, 1),
        "misaligned": misaligned,
    }.items():
        assert same(run(view, backend=backend)), name
    big = x.new_zeros(1 + 2 * 3 * N, D)
    big[1::2] = x.view(-1, D)
    offsets = torch.tensor([0, N, 2 * N, 3 * N])
    assert same(run(big[1::2], cu_seqlens=offsets, backend=backend).view(x.shape)), "packed"
    expected = expected[:1].expand(3, N, D)
    assert same(run(x[:1].expand(3, N, D), backend=backend)), "one row"


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_misaligned_halves(dtype):
    p, ffn = plugin(D, K, 8, dtype), feed_forward(D, 40, dtype, "t5")
    x = torch.randn(2, N, D).to(dtype)
    shifted = torch.zeros(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)
    with torch.no_grad():
        a = vf.compressed_ffn(x, p, ffn, backend="cpu")
        assert torch.equal(a, vf.compressed_ffn(shifted, p, ffn, backend="cpu"))


@every_kernel_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(backend, bad):
    x = torch.randn(4, N, D)
    clean = run(x, backend=backend)
    x[2, 3, 5] = bad
    y = run(x, backend=backend)
    for row in (0, 1, 3):
        assert torch.equal(y[row], clean[row])
    assert torch.isnan(y[2, :K]).all()
    assert torch.equal(y[2, K:], clean[2, K:])  # not even the row's other groups


@every_kernel_backend
def test_nan_in_padding_harms_nothing(backend):
    mask = masked("right", 3, N)
    x = torch.randn(3, N, D)
    poisoned = torch.where(mask[..., None], x, float("nan"))
    clean = run(x, mask=mask, backend=backend)
    assert torch.equal(run(poisoned, mask=mask, backend=backend)[mask], clean[mask])
    poisoned, mask, p, ffn = moved((poisoned, mask, P, FFN), backend)
    poisoned.requires_grad_()
    loss = vf.compressed_ffn(poisoned, p, ffn, mask=mask, backend=backend)[mask].sum()
    assert torch.isfinite(torch.autograd.grad(loss, poisoned)[0][mask]).all()


@needs_cpu
def test_one_thread_and_many_give_the_same():
    x = torch.randn(5, 70, D)
    before = torch.get_num_threads()
    expected = run(x)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)


@needs_cpu
@pytest.mark.usefixtures("threads")
def test_concurrent_calls():
    inputs = [torch.randn(3, 40 + i, D) for i in range(4)]
    expected = [run(x) for x in inputs]
    failures = []

    def work(i):
        for _ in range(25):
            if not torch.equal(run(inputs[i]), expected[i]):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


FORK = """
import os, torch
from variator_kernels import extension
from variator_kernels import functional as vf
torch.set_num_threads(2)
x, w, b = torch.randn(64, 64, 32), torch.randn(4, 128), torch.randn(4)
expected = vf.group_merge(x, w, b, backend="cpu")   # the parent's threads are running now
for limit in (True, False):
    child = os.fork()
    if child == 0:
        if limit:
            torch.set_num_threads(1)               # what PyTorch's own data loader does
        ok = torch.equal(vf.group_merge(x, w, b, backend="cpu"), expected)
        os._exit(0 if ok else 1)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"one thread: {limit}, exit code {os.waitstatus_to_exitcode(status)}")
"""


@needs_cpu
def test_fork():
    """Into one thread, and into as many as there were."""
    done = subprocess.run([sys.executable, "-c", FORK], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@every_kernel_backend
def test_empty_inputs(backend):
    assert run(torch.randn(0, N, D), backend=backend).shape == (0, N, D)
    assert run(torch.randn(2, 0, D), backend=backend).shape == (2, 0, D)
    assert run(torch.randn(0, D), cu_seqlens=torch.tensor([0]), backend=backend).shape == (0, D)
    x = torch.randn(2, N, D)
    nothing = torch.zeros(2, N, dtype=torch.bool)
    assert torch.equal(run(x, mask=nothing, backend=backend), x)


@every_kernel_backend
def test_tokens_outside_of_the_offsets_pass_through(backend):
    x = torch.randn(31, D)
    for first, last in ((5, 5), (5, 20), (0, 9)):
        cu = torch.tensor([first, (first + last) // 2, last])
        y = run(x, cu_seqlens=cu, backend=backend)
        assert torch.equal(y[:first], x[:first]) and torch.equal(y[last:], x[last:])
        alone = run(x[first:last], cu_seqlens=cu - first, backend=backend)
        torch.testing.assert_close(y[first:last], alone)


@every_kernel_backend
def test_gradients_of_empty_inputs_and_of_padding(backend):
    for shape, mask in (((0, N, D), None), ((2, N, D), torch.zeros(2, N, dtype=torch.bool))):
        x, mask, p, ffn = moved((torch.randn(*shape), mask, P, FFN), backend)
        leaves = [t.clone().requires_grad_() for t in (x, *p[:6])]
        y = vf.compressed_ffn(leaves[0], type(p)(*leaves[1:]), ffn, mask=mask, backend=backend)
        dx, *others = torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert torch.equal(dx, torch.ones_like(dx)) and not any(g.any() for g in others)


X = torch.randn(2, N, D)
U = torch.randn(2, -(-N // K), D)
BAD = {
    "x must be a torch.Tensor, got list": lambda: vf.group_merge([1.0], *P[:2]),
    r"x must have shape \[batch, length, hidden\], got \[19, 24\]": lambda: run(X[0]),
    r"x must have shape \[tokens, hidden\]": lambda: run(X, cu_seqlens=torch.tensor([0, 1])),
    "x must be a floating point tensor, got torch.int64": lambda: run(X.long()),
    r"mask must have shape \[2, 19\], got \[2, 7\]": lambda: run(X, mask=torch.ones(2, 7)),
    "mask and cu_seqlens exclude each other": lambda: run(
        X[0], mask=torch.ones(1, N), cu_seqlens=torch.tensor([0, N])
    ),
    "cu_seqlens must be int32 or int64": lambda: run(X[0], cu_seqlens=torch.tensor([0.0, 1.0])),
    r"cu_seqlens must rise from >= 0 to at most the number of tokens, 19, got \[0, 25\]": (
        lambda: run(X[0], cu_seqlens=torch.tensor([0, 25]))
    ),
    r"merge weight must have shape \[4, 96\], got \[4, 5\]": lambda: vf.group_merge(
        X, torch.randn(4, 5), P.merge_bias
    ),
    r"merge bias must have shape \[ratio\] with ratio >= 2, got \[1\]": lambda: vf.group_merge(
        X, torch.randn(1, D), torch.randn(1)
    ),
    "ratio must be >= 2, got 1": lambda: vf.adapter_decompress(U, X, *P[2:6], ratio=1),
    "ratio must be an integer >= 2, got nan": lambda: vf.adapter_decompress(
        U, X, *P[2:6], ratio=float("nan")
    ),
    r"u must have shape \[2, 10, 24\], got \[2, 5, 24\]": lambda: vf.adapter_decompress(
        U, X, *P[2:6], ratio=2
    ),
    r"activation must be one of \('tanh', 'identity'\), got 'relu'": (
        lambda: vf.adapter_decompress(U, X, *P[2:6], ratio=K, activation="relu")
    ),
    r"w2 must have shape \[24, 8\], got \[8, 24\]": lambda: vf.adapter_decompress(
        U, X, P.w1, P.b1, P.w2.t(), P.b2, ratio=K
    ),
    "backend must be one of .* got 'gpu'": lambda: run(X, backend="gpu"),
    "w_out must have shape": lambda: vf.compressed_ffn(X, P, FFN._replace(w_out=FFN.w_in)),
    "mask must be nonzero for a real token and 0 for padding, got negative": lambda: run(
        X, mask=torch.full((2, N), -1e9)
    ),
    r"b_in must have shape \[40\], got \[3\]": lambda: vf.compressed_ffn(
        X, P, FFN._replace(b_in=torch.zeros(3))
    ),
    "w_gate must be on x's device": lambda: vf.compressed_ffn(
        X, P, FFN._replace(w_gate=FFN.w_in.to("meta"))
    ),
    "w_in must be a floating point tensor, got torch.int8": lambda: vf.compressed_ffn(
        X, P, FFN._replace(w_in=FFN.w_in.to(torch.int8))
    ),
    "b2 must be a floating point tensor": lambda: vf.compressed_ffn(
        X, P._replace(b2=P.b2.long()), FFN
    ),
    "norm must be one of": lambda: vf.compressed_ffn(X, P, FFN._replace(norm="batch")),
    "w1 must be on x's device": lambda: vf.compressed_ffn(X, P._replace(w1=P.w1.to("meta")), FFN),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_errors_name_the_argument(message, backend, monkeypatch):
    if backend == "reference":  # as where nothing was built
        monkeypatch.setitem(extension._LOADED, "cpu", (None, "not built"))
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()


@every_kernel_backend
def test_the_ops_themselves_refuse_what_does_not_fit(backend):
    """They read addresses: a wrong shape must not become a wrong address."""
    op = torch.ops.variator.adapter_decompress
    tensors = (U, torch.randn(2, N, 8), P.w1[:, :D], P.b1, P.w2, P.b2, X)
    tensors = moved(tensors, backend)
    groups = make_groups(tensors[1], K, backend=backend)
    good = (*tensors, *groups, "tanh", backend)
    assert op(*good).shape == X.shape
    for place, wrong in {0: U[:, 1:], 2: P.w1, 4: P.w2.t(), 5: P.b1, 6: X[:, 1:]}.items():
        wrong = moved(wrong, backend)
        with pytest.raises(ValueError, match="does not fit"):
            op(*good[:place], wrong, *good[place + 1 :])
    half = op(*good[:6], good[6].bfloat16(), *good[7:])
    torch.testing.assert_close(half, op(*good), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", [*kernel_backends, on_cuda])
def test_the_fused_op_itself_refuses_what_does_not_fit(backend):
    """The public function checks, and calls a backend without its op."""
    op, dtype = torch.ops.variator.compressed_ffn, torch.bfloat16
    p, ffn = cast(P, dtype), cast(FFN, dtype)
    tensors = (X.to(dtype), *p[:6], *ffn[:6], ffn.norm_weight, ffn.norm_bias)
    tensors = moved(tensors, backend)
    groups = make_groups(tensors[0], K, backend=backend)
    rest = (*groups, ffn.activation, ffn.norm, ffn.eps, False, True, "tanh", backend)
    assert op(*tensors, *rest).shape == X.shape
    for place in (1, 2, 3, 4, 5, 6, 7, 8, 13):
        wrong = tensors[place][..., 1:]
        with pytest.raises(ValueError, match="does not fit"):
            op(*tensors[:place], wrong, *tensors[place + 1 :], *rest)


@needs_cpu
def test_sizes_are_64_bit():
    """Of tokens and groups, up to the addresses that are made of them."""
    start, span = torch.tensor([0, 2**33]), torch.tensor([4, 3])
    groups = listed._kernel((start, span, None, None), 2, 4)
    assert groups.held(2**33 + 3) == 7 and groups.held(2**33 + 2) == -1
