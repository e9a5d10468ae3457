"""Each op's forward pass against the float64 reference: instruction sets, dtypes, shapes, masks."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.ops.cases import (
    DTYPES,
    ISAS,
    KEPT,
    MASKS,
    RATIOS,
    assert_close,
    cast,
    dtypes_of,
    every_kernel,
    every_kernel_backend,
    feed_forward,
    interpreted,
    kept,
    kernels,  # noqa: F401  (fixture)
    masked,
    moved,
    on_triton,
    plugin,
    shapes_of,
    skip_interpreted,
    skip_unknown,
)
from tests.ops.remember import remembered
from variator_kernels import functional as vf
from variator_kernels.ops.arguments import MergeWeights, Norm
from variator_kernels.ops.group_merge import op as merge
from variator_kernels.ops.make_groups import make_groups


@remembered
@torch.no_grad()
def expected(op, x, arguments, options):
    """What ``op(x, *arguments)`` is in float64, and in plain PyTorch."""
    wide = [a.double() if isinstance(a, torch.Tensor) else cast(a, torch.double) for a in arguments]
    truth = op(x.double(), *wide, backend="reference", **options)
    return truth, op(x, *arguments, backend="reference", **options)


def compare(backend, op, x, arguments, what, **options):
    """Runs ``op(x, *arguments)`` on a backend, plain and in float64; checks the first."""
    x, arguments = moved(x, backend), moved(tuple(arguments), backend)
    options = {name: moved(value, backend) for name, value in options.items()}
    truth, plain = expected(op, x, arguments, options)
    with torch.no_grad():
        out = op(x, *arguments, backend=backend, **options)
    assert out.dtype == x.dtype
    assert_close(out, plain, truth, what)


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_kind", MASKS)
def test_every_shape(kernels, dtype, mask_kind):  # noqa: F811
    skip_unknown(dtype, kernels)
    if dtype != torch.float32:  # what a mask does to the lists of groups knows no dtype
        skip_interpreted(kernels, mask_kind not in ("none", "holes"), "16 bits at other masks")
    for rows, n, d in shapes_of(kernels, dtype):
        k = 4 if d < 193 else 8
        x = torch.randn(rows, n, d).to(dtype)
        mask = masked(mask_kind, rows, n)
        p, ffn = plugin(d, k, 8, dtype), feed_forward(d, 40, dtype, "t5")
        where = f"{rows}x{n}x{d}"
        compare(kernels, vf.group_merge, x, p[:2], f"group_merge {where}", mask=mask)
        u = torch.randn(rows, -(-n // k), d).to(dtype)
        compare(
            kernels,
            lambda h, u, *w, **o: vf.adapter_decompress(u, h, *w, **o),
            x,
            (u, *p[2:6]),
            f"adapter_decompress {where}",
            ratio=k,
            mask=mask,
        )
        compare(kernels, vf.compressed_ffn, x, (p, ffn), f"compressed_ffn {where}", mask=mask)


@pytest.mark.parametrize("kernels", ISAS, indirect=True)
@pytest.mark.parametrize("threads", [2, 5], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_among_threads(kernels, threads, dtype):  # noqa: F811
    """Even shares and others, of more tokens than a thread takes at once, and of fewer groups than
    there are threads."""
    for rows, n in ((3, 301), (1, 9)):
        p, ffn = plugin(40, 4, 8, dtype), feed_forward(40, 64, dtype, "v1.1")
        x, mask = torch.randn(rows, n, 40).to(dtype), masked("holes", rows, n)
        compare(kernels, vf.compressed_ffn, x, (p, ffn), f"{rows}x{n}", mask=mask)
        compare(kernels, vf.group_merge, x, p[:2], f"group_merge {rows}x{n}", mask=mask)


@every_kernel
@pytest.mark.parametrize("k", RATIOS)
def test_every_ratio(kernels, k):  # noqa: F811
    rows, n = (1, 40) if interpreted(kernels) else (3, 75)
    for dtype in dtypes_of(kernels)[:2]:
        p, ffn = plugin(48, k, 20, dtype), feed_forward(48, 64, dtype, "t5")
        x = torch.randn(rows, n, 48).to(dtype)
        kinds = ("none", "holes")
        if interpreted(kernels):
            kinds = kinds[1:] if dtype == torch.float32 else kinds[:1]
        for kind in kinds:
            mask = masked(kind, rows, n)
            compare(kernels, vf.compressed_ffn, x, (p, ffn), f"{kind} {dtype}", mask=mask)


@every_kernel
@pytest.mark.parametrize("kind", ["t5", "v1.1", "bert"])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_every_kind_of_ffn(kernels, kind, activation):  # noqa: F811
    known = dtypes_of(kernels)
    for dtype in known[:1] if interpreted(kernels) and activation == "identity" else known:
        p, ffn = plugin(40, 3, 5, dtype, activation), feed_forward(40, 56, dtype, kind)
        x = torch.randn(2, 23, 40).to(dtype)
        for mask_kind in ("left",) if interpreted(kernels) else ("none", "left"):
            mask = masked(mask_kind, 2, 23)
            where = f"{kind} {dtype} {mask_kind}"
            compare(kernels, vf.compressed_ffn, x, (p, ffn), where, mask=mask)


@every_kernel
@pytest.mark.usefixtures("threads")
def test_t5_base_size(kernels):  # noqa: F811
    d, f, n = (96, 64, 30) if interpreted(kernels) else (768, 3072, 130)
    for dtype in dtypes_of(kernels)[:2]:
        p, ffn = plugin(d, 4, 64, dtype), feed_forward(d, f, dtype, "t5")
        x = torch.randn(2, n, d).to(dtype)
        compare(kernels, vf.compressed_ffn, x, (p, ffn), str(dtype), mask=masked("right", 2, n))


@every_kernel
@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("kind", KEPT)
def test_kept_tokens(kernels, mask_kind, kind):  # noqa: F811
    """The first, ends, any, all; in ragged tails, among padding and holes, in rows too short."""
    known = dtypes_of(kernels)
    for dtype in known[:1] if interpreted(kernels) else known:
        shapes = shapes_of(kernels, dtype)
        for rows, n, d in [(2, 19, 24)] if interpreted(kernels) else shapes[1:6]:
            x, mask = torch.randn(rows, n, d).to(dtype), masked(mask_kind, rows, n)
            k, ffn_kind = (4, "t5") if n % 2 else (3, "bert")
            p, ffn = plugin(d, k, 8, dtype), feed_forward(d, 40, dtype, ffn_kind)
            options = {"mask": mask, **kept(kind, rows, n)}
            where = f"{rows}x{n}x{d} {ffn_kind} {dtype}"
            compare(kernels, vf.compressed_ffn, x, (p, ffn), where, **options)


@every_kernel
@pytest.mark.parametrize("k", [2, 3, 4, 8, 32])
def test_kept_tokens_at_every_ratio(kernels, k):  # noqa: F811
    rows, n = (1, 40) if interpreted(kernels) else (3, 75)
    for dtype in dtypes_of(kernels)[: 1 if interpreted(kernels) else 2]:
        p, ffn = plugin(48, k, 20, dtype), feed_forward(48, 64, dtype, "v1.1")
        x = torch.randn(rows, n, 48).to(dtype)
        pairs = [("first", "none"), ("ends", "left"), ("any", "holes")]
        # Which tokens stay whole is in the lists of groups, the ratio in the kernel.
        for kind, mask_kind in [pairs[k % 3]] if interpreted(kernels) else pairs:
            options = {"mask": masked(mask_kind, rows, n), **kept(kind, rows, n)}
            compare(kernels, vf.compressed_ffn, x, (p, ffn), f"{kind} {dtype}", **options)


@every_kernel_backend
@pytest.mark.parametrize("kind", KEPT)
def test_kept_tokens_of_packed_input(backend, kind):
    cu = torch.tensor([2, 11, 11, 12, 28, 31] if not interpreted(backend) else [1, 6, 6, 7, 13])
    x = torch.randn(int(cu[-1]) + 2, 24)
    p, ffn = plugin(24, 4, 8, torch.float32), feed_forward(24, 40, torch.float32, "bert")
    options = {"cu_seqlens": cu, **kept(kind, len(x))}
    compare(backend, vf.compressed_ffn, x, (p, ffn), kind, **options)


@every_kernel_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_input_means_the_padded_batch(backend, dtype):
    skip_unknown(dtype, backend)
    k, d = 4, 24
    lengths = [9, 1, 0, 16, 3]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    p, ffn = plugin(d, k, 8, dtype), feed_forward(d, 40, dtype, "t5")
    packed = torch.randn(int(cu[-1]), d).to(dtype)
    padded = torch.full((len(lengths), max(lengths), d), float("nan")).to(dtype)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded[mask] = packed
    weights, place = moved((p, ffn), backend), functools.partial(moved, kernels=backend)
    for name in ("reference", backend):
        run = functools.partial(vf.compressed_ffn, backend=name)
        with torch.no_grad():
            a = run(place(packed), *weights, cu_seqlens=place(cu))
            b = run(place(padded), *weights, mask=place(mask))[place(mask)]
        assert torch.equal(a, b) or torch.allclose(a, b, rtol=1e-2, atol=1e-2)
    compare(backend, vf.compressed_ffn, packed, (p, ffn), "compressed_ffn", cu_seqlens=cu)
    compare(backend, vf.group_merge, packed, p[:2], "group_merge", cu_seqlens=cu)
    u = torch.randn((len(packed) + len(lengths) * (k - 1)) // k, d).to(dtype)
    compare(
        backend,
        lambda h, u, *w, **o: vf.adapter_decompress(u, h, *w, **o),
        packed,
        (u, *p[2:6]),
        "adapter_decompress",
        ratio=k,
        cu_seqlens=cu,
    )


@every_kernel_backend
def test_mixed_dtypes_follow_transformers(backend):
    """T5 in fp16 keeps wo in fp32: the sum x + FFN(x) is then fp32."""
    p = plugin(24, 4, 8, torch.float16)
    ffn = feed_forward(24, 40, torch.float16, "t5")
    ffn = ffn._replace(w_out=ffn.w_out.float())
    x, p, ffn = moved((torch.randn(2, 10, 24, dtype=torch.float16), p, ffn), backend)
    with torch.no_grad():
        truth = vf.compressed_ffn(
            x.double(), cast(p, torch.double), cast(ffn, torch.double), backend="reference"
        )
        plain = vf.compressed_ffn(x, p, ffn, backend="reference")
        out = vf.compressed_ffn(x, p, ffn, backend=backend)
    assert out.dtype == plain.dtype == torch.float32
    assert_close(out, plain, truth)


@every_kernel_backend
@pytest.mark.parametrize("kind", ["t5", "bert"])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_norm_of_another_dtype(backend, kind, dtypes):
    dtype, norm_dtype = (getattr(torch, name) for name in dtypes)
    p, ffn = plugin(24, 4, 8, dtype), feed_forward(24, 40, dtype, kind)
    ffn = ffn._replace(norm_weight=ffn.norm_weight.to(norm_dtype))
    x = torch.randn(3, 19, 24).to(dtype)
    mask = masked("left", 3, 19)
    compare(backend, vf.compressed_ffn, x, (p, ffn), kind, mask=mask)
    x, p, ffn, mask = moved((x, p, ffn, mask), backend)
    with torch.no_grad():
        y = vf.compressed_ffn(x, p, ffn, mask=mask, backend=backend)
    assert torch.equal(y[~mask], x[~mask])


@every_kernel
def test_layer_norm_of_a_large_mean(kernels):  # noqa: F811
    dtype = dtypes_of(kernels)[0]
    p, ffn = plugin(48, 4, 8, dtype), feed_forward(48, 64, dtype, "bert")
    x = (300 + torch.randn(2, 22, 48)).to(dtype)
    compare(kernels, vf.compressed_ffn, x, (p, ffn._replace(post_norm=False)), "offset")


@pytest.mark.parametrize("kernels", [*ISAS, on_triton], indirect=True)
def test_the_mean_of_large_numbers_itself(kernels):  # noqa: F811
    """The whole sublayer hides it: this looks at 8 columns of the norm, by projecting on them."""
    d = 193
    x, w, b = torch.randn(2, 16, d) + 3000, torch.zeros(4, 4 * d), torch.zeros(4)
    tensors = (x, w, b, torch.ones(d), torch.zeros(d), torch.eye(8, d))
    x, w, b, scale, shift, columns = moved(tensors, kernels)
    norm = Norm("layer", scale, shift, 1e-6)
    groups = make_groups(x, 4, backend=kernels)
    out = merge.group_merge(x, MergeWeights(w, b, columns), groups, norm, kernels)[1]
    norm = functools.partial(torch.nn.functional.layer_norm, normalized_shape=(d,), eps=1e-6)
    assert_close(out, norm(x)[..., :8], norm(x.double())[..., :8])
