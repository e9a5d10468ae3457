"""Each op's forward pass against the float64 reference: instruction sets, dtypes, shapes, masks."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import (
    DTYPES,
    MASKS,
    RATIOS,
    SHAPES,
    assert_close,
    cast,
    every_isa,
    feed_forward,
    isa,  # noqa: F401  (fixture)
    masked,
    needs_cpu,
    plugin,
)
from variator_kernels import functional as vf

pytestmark = needs_cpu


def compare(op, x, arguments, what, **options):
    """Runs ``op(x, *arguments)`` on the CPU kernels, plain and in float64; checks the first."""
    wide = [a.double() if isinstance(a, torch.Tensor) else cast(a, torch.double) for a in arguments]
    with torch.no_grad():
        truth = op(x.double(), *wide, backend="reference", **options)
        plain = op(x, *arguments, backend="reference", **options)
        out = op(x, *arguments, backend="cpu", **options)
    assert out.dtype == x.dtype
    assert_close(out, plain, truth, what)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_kind", MASKS)
def test_every_shape(isa, dtype, mask_kind):  # noqa: F811
    for rows, n, d in SHAPES:
        k = 4 if d != 193 else 8
        x = torch.randn(rows, n, d).to(dtype)
        mask = masked(mask_kind, rows, n)
        p, ffn = plugin(d, k, 8, dtype), feed_forward(d, 40, dtype, "t5")
        where = f"{rows}x{n}x{d}"
        compare(vf.group_merge, x, p[:2], f"group_merge {where}", mask=mask)
        u = torch.randn(rows, -(-n // k), d).to(dtype)
        compare(
            lambda h, u, *w, **o: vf.adapter_decompress(u, h, *w, **o),
            x,
            (u, *p[2:6]),
            f"adapter_decompress {where}",
            ratio=k,
            mask=mask,
        )
        compare(vf.compressed_ffn, x, (p, ffn), f"compressed_ffn {where}", mask=mask)


@every_isa
@pytest.mark.parametrize("k", RATIOS)
def test_every_ratio(isa, k):  # noqa: F811
    for dtype in DTYPES[:2]:
        p, ffn = plugin(48, k, 20, dtype), feed_forward(48, 64, dtype, "t5")
        x = torch.randn(3, 75, 48).to(dtype)
        for kind in ("none", "holes"):
            compare(vf.compressed_ffn, x, (p, ffn), f"{kind} {dtype}", mask=masked(kind, 3, 75))


@every_isa
@pytest.mark.parametrize("kind", ["t5", "v1.1", "bert"])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_every_kind_of_ffn(isa, kind, activation):  # noqa: F811
    for dtype in DTYPES:
        p, ffn = plugin(40, 3, 5, dtype, activation), feed_forward(40, 56, dtype, kind)
        x = torch.randn(2, 23, 40).to(dtype)
        for mask_kind in ("none", "left"):
            mask = masked(mask_kind, 2, 23)
            compare(vf.compressed_ffn, x, (p, ffn), f"{kind} {dtype} {mask_kind}", mask=mask)


@every_isa
def test_t5_base_size(isa):  # noqa: F811
    for dtype in (torch.float32, torch.bfloat16):
        p, ffn = plugin(768, 4, 64, dtype), feed_forward(768, 3072, dtype, "t5")
        x = torch.randn(2, 130, 768).to(dtype)
        compare(vf.compressed_ffn, x, (p, ffn), str(dtype), mask=masked("right", 2, 130))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_input_means_the_padded_batch(dtype):
    k, d = 4, 24
    lengths = [9, 1, 0, 16, 3]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    p, ffn = plugin(d, k, 8, dtype), feed_forward(d, 40, dtype, "t5")
    packed = torch.randn(int(cu[-1]), d).to(dtype)
    padded = torch.full((len(lengths), max(lengths), d), float("nan")).to(dtype)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded[mask] = packed
    for backend in ("reference", "cpu"):
        with torch.no_grad():
            a = vf.compressed_ffn(packed, p, ffn, cu_seqlens=cu, backend=backend)
            b = vf.compressed_ffn(padded, p, ffn, mask=mask, backend=backend)
            assert torch.equal(a, b[mask]) or torch.allclose(a, b[mask], rtol=1e-2, atol=1e-2)
    compare(vf.compressed_ffn, packed, (p, ffn), "compressed_ffn", cu_seqlens=cu)
    compare(vf.group_merge, packed, p[:2], "group_merge", cu_seqlens=cu)
    u = torch.randn((len(packed) + len(lengths) * (k - 1)) // k, d).to(dtype)
    compare(
        lambda h, u, *w, **o: vf.adapter_decompress(u, h, *w, **o),
        packed,
        (u, *p[2:6]),
        "adapter_decompress",
        ratio=k,
        cu_seqlens=cu,
    )


def test_mixed_dtypes_follow_transformers():
    """T5 in fp16 keeps wo in fp32: the sum x + FFN(x) is then fp32."""
    p = plugin(24, 4, 8, torch.float16)
    ffn = feed_forward(24, 40, torch.float16, "t5")
    ffn = ffn._replace(w_out=ffn.w_out.float())
    x = torch.randn(2, 10, 24, dtype=torch.float16)
    with torch.no_grad():
        truth = vf.compressed_ffn(
            x.double(), cast(p, torch.double), cast(ffn, torch.double), backend="reference"
        )
        plain = vf.compressed_ffn(x, p, ffn, backend="reference")
        out = vf.compressed_ffn(x, p, ffn, backend="cpu")
    assert out.dtype == plain.dtype == torch.float32
    assert_close(out, plain, truth)


@pytest.mark.parametrize("kind", ["t5", "bert"])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_norm_of_another_dtype(kind, dtypes):
    dtype, norm_dtype = (getattr(torch, name) for name in dtypes)
    p, ffn = plugin(24, 4, 8, dtype), feed_forward(24, 40, dtype, kind)
    ffn = ffn._replace(norm_weight=ffn.norm_weight.to(norm_dtype))
    x = torch.randn(3, 19, 24).to(dtype)
    mask = masked("left", 3, 19)
    compare(vf.compressed_ffn, x, (p, ffn), kind, mask=mask)
    with torch.no_grad():
        y = vf.compressed_ffn(x, p, ffn, mask=mask, backend="cpu")
    assert torch.equal(y[~mask], x[~mask])


@every_isa
def test_layer_norm_of_a_large_mean(isa):  # noqa: F811
    p, ffn = plugin(48, 4, 8, torch.float32), feed_forward(48, 64, torch.float32, "bert")
    x = 300 + torch.randn(2, 22, 48)
    compare(vf.compressed_ffn, x, (p, ffn._replace(post_norm=False)), "offset")
