"""Gradients of each op: against the float64 reference, and gradcheck of the kernels in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.cases import (
    ISAS,
    KEPT,
    MASKS,
    assert_close,
    cast,
    dtypes_of,
    every_backend,
    every_kernel,
    every_kernel_backend,
    feed_forward,
    hidden_of,
    interpreted,
    kept,
    kernels,  # noqa: F401  (fixture)
    masked,
    moved,
    needs_cpu,
    plugin,
    skip_interpreted,
    skip_unknown,
)
from tests.ops.remember import remembered
from variator_kernels import functional as vf


def leaves(values):
    made = [v.detach().clone().requires_grad_() if isinstance(v, Tensor) else v for v in values]
    return type(values)(*made) if hasattr(values, "_fields") else made


def gradients(x, p, ffn, dtype, backend, dy, **options):
    """Every gradient of the sublayer, by name."""
    x = x.detach().to(dtype).requires_grad_()
    p, ffn = leaves(cast(p, dtype)), leaves(cast(ffn, dtype))
    y = vf.compressed_ffn(x, p, ffn, backend=backend, **options)
    tensors = {"x": x}
    for values in (p, ffn):
        pairs = zip(values._fields, values, strict=True)
        tensors |= {name: v for name, v in pairs if isinstance(v, Tensor)}
    found = torch.autograd.grad(y, list(tensors.values()), dy.to(dtype))
    return dict(zip(tensors, found, strict=True))


@remembered
def expected(x, p, ffn, dy, options):
    """The gradients in float64, and in plain PyTorch."""
    truth = gradients(x, p, ffn, torch.double, "reference", dy, **options)
    return truth, gradients(x, p, ffn, x.dtype, "reference", dy, **options)


def check(backend, x, p, ffn, **options):
    x, p, ffn = moved((x, p, ffn), backend)
    options = {name: moved(value, backend) for name, value in options.items()}
    dy = torch.randn(x.shape).to(x)
    if options.get("mask") is not None:
        dy = dy * options["mask"][..., None]
    truth, plain = expected(x, p, ffn, dy, options)
    out = gradients(x, p, ffn, x.dtype, backend, dy, **options)
    for names in PARTS:
        names = [name for name in names if name in truth]
        if not names:
            continue
        assert all(out[name].dtype == x.dtype for name in names)
        joined = [
            torch.cat([g[name].flatten().double() for name in names]) for g in (out, plain, truth)
        ]
        assert_gradient(*joined, what=f"d {'+'.join(names)}")


# A bias is the weight of a constant input: the two are compared as one array. On its own a bias
# gradient of k numbers would compare luck with luck.
PARTS = [
    ("x",),
    ("merge_weight", "merge_bias"),
    ("w1", "b1"),
    ("w2", "b2"),
    ("norm_weight", "norm_bias"),
    ("w_in", "b_in"),
    ("w_gate", "b_gate"),
    ("w_out", "b_out"),
]


def assert_gradient(out: Tensor, plain: Tensor, truth: Tensor, what: str) -> None:
    """The project's rule on the root mean square error, relative to the root mean square gradient.

    Not on the largest error: gradients are sums over tokens, and in bf16 the one largest rounding
    of plain PyTorch is no measure of what is allowed. A single wrong element among the few hundred
    of these tests still shows.
    """
    assert not torch.isnan(out).any(), f"{what}: NaN, an element was not written"
    scale = truth.square().mean().sqrt().clamp_min(1e-3) if truth.numel() else 1.0
    error = ((out - truth).square().mean().sqrt() / scale).item() if truth.numel() else 0.0
    allowed = (
        2 * ((plain - truth).square().mean().sqrt() / scale).item() + 1e-6 if truth.numel() else 0
    )
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask_kind", MASKS)
def test_gradients(kernels, dtype, mask_kind):  # noqa: F811
    skip_unknown(dtype, kernels)
    if dtype != torch.float32:  # as in test_forward.py
        skip_interpreted(kernels, mask_kind not in ("none", "holes"), "16 bits at other masks")
    cases = [
        (2, 37, 50, 4, "t5"),
        (3, 61, 33, 8, "v1.1"),
        (2, 23, 24, 3, "bert"),
        (2, 3, 20, 5, "t5"),
    ]
    if interpreted(kernels):  # smaller, and in 16 bits one
        cases = [(2, 37, 20, 4, "t5"), (1, 35, 33, 8, "v1.1"), *cases[2:]]
        cases = cases if dtype == torch.float32 else cases[:1]
    for rows, n, d, k, kind in cases:
        d = hidden_of(kernels, d)
        if n < k and dtype != torch.float32:
            continue  # a group or two: their few roundings are no sample to compare
        p, ffn = plugin(d, k, 9, dtype), feed_forward(d, 40, dtype, kind)
        if dtype != torch.float32 and ffn.activation == "relu":
            # ReLU's gradient jumps at 0: one rounding of g may flip a unit, here or in PyTorch.
            ffn = ffn._replace(activation="gelu")
        check(kernels, torch.randn(rows, n, d).to(dtype), p, ffn, mask=masked(mask_kind, rows, n))


@pytest.mark.parametrize("kernels", ISAS, indirect=True)
@pytest.mark.parametrize("threads", [2, 5], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_shared_among_threads(kernels, threads, dtype):  # noqa: F811
    """Those of weights are sums over what each thread has seen."""
    for rows, n in ((3, 301), (1, 9)):
        p, ffn = plugin(40, 4, 9, dtype), feed_forward(40, 64, dtype, "v1.1")
        mask = masked("holes", rows, n)
        check(kernels, torch.randn(rows, n, 40).to(dtype), p, ffn, mask=mask)


INTERPRETED_MASK = {"first": "none", "ends": "left", "any": "holes", "all": "left", "more": "none"}
"""The one of a kind of kept tokens; the forward pass is tested with every one."""


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_kind", ["none", "left", "holes"])
@pytest.mark.parametrize("kind", KEPT)
def test_gradients_of_kept_tokens(kernels, dtype, mask_kind, kind):  # noqa: F811
    """They bring none to the adapter, and their own whole to the FFN."""
    skip_unknown(dtype, kernels)
    # Which tokens stay whole and which there are is in the lists of groups, which know no dtype.
    if dtype != torch.float32:
        skip_interpreted(kernels, (kind, mask_kind) != ("any", "holes"), "16 bits of other lists")
    skip_interpreted(kernels, mask_kind != INTERPRETED_MASK[kind], "other masks")
    cases = [(2, 37, 20, 4, "v1.1"), (2, 23, 24, 3, "bert")]
    for rows, n, d, k, ffn_kind in cases[:1] if interpreted(kernels) else cases:
        d = hidden_of(kernels, d)
        p, ffn = plugin(d, k, 9, dtype), feed_forward(d, 40, dtype, ffn_kind)
        options = {"mask": masked(mask_kind, rows, n), **kept(kind, rows, n)}
        check(kernels, torch.randn(rows, n, d).to(dtype), p, ffn, **options)


@every_kernel_backend
@pytest.mark.parametrize("kind", ["ends", "any"])
def test_gradients_of_kept_tokens_of_packed_input(backend, kind):
    p, ffn = plugin(24, 4, 8, torch.float32), feed_forward(24, 40, torch.float32, "t5")
    cu = torch.tensor([0, 9, 9, 17, 31])
    check(backend, torch.randn(31, 24), p, ffn, cu_seqlens=cu, **kept(kind, 31))


@every_backend
def test_kept_tokens_alone_give_a_plugin_no_gradient(backend):
    p, ffn = plugin(24, 4, 8, torch.float32), feed_forward(24, 40, torch.float32, "t5")
    x, p, ffn = moved((torch.randn(2, 11, 24), p, ffn), backend)
    x, p = x.requires_grad_(), leaves(p)
    y = vf.compressed_ffn(x, p, ffn, keep_first=11, backend=backend)
    for gradient in torch.autograd.grad(y.square().sum(), p[:6]):
        assert (gradient == 0).all()


@every_kernel
@pytest.mark.usefixtures("threads")
def test_gradients_of_many_groups(kernels):  # noqa: F811
    """More groups than one chunk holds, more tokens than one block."""
    n = 71 if interpreted(kernels) else 301
    dtype = dtypes_of(kernels)[0]
    p, ffn = plugin(40, 2, 12, dtype), feed_forward(40, 48, dtype, "v1.1")
    check(kernels, torch.randn(2, n, 40).to(dtype), p, ffn)


@every_kernel
@pytest.mark.parametrize("k", [16, 32])
def test_gradients_of_large_groups(kernels, k):  # noqa: F811
    dtype = dtypes_of(kernels)[0]
    p, ffn = plugin(24, k, 9, dtype), feed_forward(24, 40, dtype, "bert")
    check(kernels, torch.randn(2, 70, 24).to(dtype), p, ffn._replace(post_norm=False))


@every_kernel_backend
def test_gradients_of_packed_input(backend):
    p, ffn = plugin(24, 4, 8, torch.float32), feed_forward(24, 40, torch.float32, "t5")
    check(backend, torch.randn(17, 24), p, ffn, cu_seqlens=torch.tensor([0, 9, 9, 17]))


@needs_cpu
@pytest.mark.parametrize("kind", ["ends", "any", "all"])
def test_gradcheck_of_kept_tokens(kind):
    d, k, n = 3, 3, 8
    p = leaves(plugin(d, k, 2, torch.double))
    ffn = feed_forward(d, 4, torch.double, "bert")._replace(activation="silu")
    x = torch.randn(2, n, d, dtype=torch.double, requires_grad=True)
    options = {"mask": masked("holes", 2, n), **kept(kind, 2, n)}

    def layer(x, *weights):
        weights = type(p)(*weights, activation="tanh")
        return vf.compressed_ffn(x, weights, ffn, backend="cpu", **options)

    assert torch.autograd.gradcheck(layer, (x, *p[:6]))


@needs_cpu
@pytest.mark.parametrize("mask_kind", ["none", "holes"])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_gradcheck(mask_kind, activation):
    d, k, n = 5, 3, 11
    p = leaves(plugin(d, k, 4, torch.double, activation))
    ffn = feed_forward(d, 6, torch.double, "bert")._replace(activation="silu")
    x = torch.randn(2, n, d, dtype=torch.double, requires_grad=True)
    mask = masked(mask_kind, 2, n)

    def layer(x, *weights):
        return vf.compressed_ffn(
            x, type(p)(*weights, activation=activation), ffn, mask=mask, backend="cpu"
        )

    assert torch.autograd.gradcheck(layer, (x, *p[:6]))

    def merge(x, weight, bias):
        return vf.group_merge(x, weight, bias, mask=mask, backend="cpu")

    assert torch.autograd.gradcheck(merge, (x, *p[:2]))
    u = torch.randn(2, -(-n // k), d, dtype=torch.double, requires_grad=True)

    def decompress(u, h, *weights):
        return vf.adapter_decompress(
            u, h, *weights, ratio=k, mask=mask, activation=activation, backend="cpu"
        )

    assert torch.autograd.gradcheck(decompress, (u, x, *p[2:6]))


@every_kernel_backend
def test_backward_is_deterministic(backend):
    p, ffn = plugin(32, 4, 8, torch.float32), feed_forward(32, 40, torch.float32, "t5")
    n = 25 if interpreted(backend) else 100
    x, dy, p, ffn = moved((torch.randn(4, n, 32), torch.randn(4, n, 32), p, ffn), backend)
    first = gradients(x, p, ffn, torch.float32, backend, dy)
    for _ in range(1 if interpreted(backend) else 3):
        again = gradients(x, p, ffn, torch.float32, backend, dy)
        for name in first:
            assert torch.equal(first[name], again[name]), name


@every_kernel_backend
def test_autocast_over_fp32_parameters(backend):
    p = leaves(moved(plugin(32, 4, 8, torch.float32), backend))
    ffn = moved(feed_forward(32, 48, torch.float32, "t5"), backend)
    x = moved(torch.randn(2, 19, 32), backend).requires_grad_()
    results = {}
    for name in ("reference", backend):
        with torch.autocast(x.device.type, torch.bfloat16):
            y = vf.compressed_ffn(x, p, ffn, backend=name)
        assert y.dtype == torch.float32
        results[name] = (y, *torch.autograd.grad(y.square().sum(), (x, *p[:6])))
    truth_p, truth_ffn = leaves(cast(p, torch.double)), cast(ffn, torch.double)
    xd = x.detach().double().requires_grad_()
    y = vf.compressed_ffn(xd, truth_p, truth_ffn, backend="reference")
    truth = (y, *torch.autograd.grad(y.square().sum(), (xd, *truth_p[:6])))
    for out, plain, true in zip(results[backend], results["reference"], truth, strict=True):
        assert_close(out, plain, true)


@every_backend
def test_dropout_of_the_merged_vector(backend):
    """Dropout sits on FFN(g): the tokens of a group share what was dropped."""
    d, k = 64, 4
    p = plugin(d, k, 8, torch.float32)
    p = p._replace(w2=torch.zeros_like(p.w2), b2=torch.zeros_like(p.b2))
    ffn = feed_forward(d, 48, torch.float32, "t5")._replace(dropout_outer=0.5)
    x, p, ffn = moved((torch.randn(1, 8, d), p, ffn), backend)
    o = (vf.compressed_ffn(x, p, ffn, backend=backend) - x).reshape(2, k, d)
    dropped = o.abs() < 1e-6
    assert 0.2 < dropped.float().mean() < 0.8
    assert (dropped == dropped[:, :1]).all()


@every_backend
@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_what_padding_holds_reaches_no_gradient(backend, kind):
    p, ffn = plugin(24, 4, 8, torch.float32), feed_forward(24, 40, torch.float32, kind)
    mask = masked("left", 3, 19)
    x = torch.where(mask[..., None], torch.randn(3, 19, 24), float("nan"))
    x, p, ffn, mask = moved((x, p, ffn, mask), backend)
    x, p, ffn = x.requires_grad_(), leaves(p), leaves(ffn)
    y = vf.compressed_ffn(x, p, ffn, mask=mask, backend=backend)
    tensors = [t for t in (*p, *ffn) if isinstance(t, Tensor)]
    for gradient in torch.autograd.grad(y[mask].sum(), tensors):
        assert torch.isfinite(gradient).all()
    u = torch.randn(3, 5, 24).to(x)
    o = vf.adapter_decompress(u, x, *p[2:6], ratio=4, mask=mask, backend=backend)
    for gradient in torch.autograd.grad(o.sum(), p[2:6]):
        assert torch.isfinite(gradient).all()


@every_kernel_backend
def test_second_derivatives_are_refused(backend):
    p, ffn = plugin(24, 4, 8, torch.float32), feed_forward(24, 40, torch.float32, "t5")
    x, p, ffn = moved((torch.randn(2, 9, 24), p, ffn), backend)
    x, p = x.requires_grad_(), leaves(p)
    y = vf.compressed_ffn(x, p, ffn, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
