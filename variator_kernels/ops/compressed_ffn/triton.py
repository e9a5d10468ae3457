"""compressed_ffn on Triton: merge, two products with fused activation, decompress.

The products are Triton's or cuBLAS's (through PyTorch), as the launch table says.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...triton_kernels import launch
from ...triton_kernels.linear import linear_kernel
from ...triton_kernels.row_norm import row_norm_kernel
from ..adapter_decompress.triton import run as run_decompress
from ..arguments import NO_NORM, Norm, flat
from ..feed_forward import FeedForward, PluginWeights, activate, products
from ..gpu_arguments import Groups, dense, groups, rows_of
from ..group_merge.triton import run as run_merge


def linear(
    kernel: str,
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    activation: str,
    w_gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    case: dict[str, Any],
) -> Tensor:
    """``act(a · wᵀ + bias) [* (a · w_gateᵀ + gate_bias)]``; all of one dtype, ``a [rows, in]``."""
    row = launch.settings(kernel, activation=activation, **case)
    if row["products"] == "torch":
        out = F.linear(a, w, bias)
        out = out if activation == "none" else activate(out, activation)
        return out if w_gate is None else out * F.linear(a, w_gate, gate_bias)
    out = a.new_empty(a.shape[0], w.shape[0])
    if out.numel() == 0:
        return out
    w, w_gate = rows_of(w), None if w_gate is None else rows_of(w_gate)
    operands = [a, w, w_gate, out]
    bm, bn, bk = row["bm"], row["bn"], row["bk"]
    tma = row["tma"] and all(_describable(t) for t in operands if t is not None)
    if tma:
        blocks = [[bm, bk], [bn, bk], [bn, bk], [bm, bn]]
        operands = [
            None if t is None else TensorDescriptor.from_tensor(t, block)
            for t, block in zip(operands, blocks, strict=True)
        ]
    tiles = triton.cdiv(a.shape[0], bm) * triton.cdiv(w.shape[0], bn)
    programs = min(tiles, launch.processors(a) * row["persistent"] or tiles)
    linear_kernel[(programs,)](
        *operands[:3], dense(bias), dense(gate_bias), operands[3],
        a.shape[0], w.shape[0], a.shape[1],
        a.stride(0), w.stride(0), 0 if w_gate is None else w_gate.stride(0),
        BM=bm, BN=bn, BK=bk, GROUP=row["group"], ACTIVATION=activation, GATED=w_gate is not None,
        TMA=tma, PERSISTENT=row["persistent"] > 0,
        PRECISION=launch.precision(a), **launch.options(row),
    )  # fmt: skip
    return out


def _describable(matrix: Tensor) -> bool:
    """Whether the copy engine takes this matrix: 16-byte aligned rows."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def fused_products(g: Tensor, ffn: FeedForward, k: int) -> Tensor:
    """``FFN(g)`` for ``g [groups, d]``, in g's dtype."""
    if any(t.dtype != g.dtype for t in (ffn.w_in, ffn.w_out, ffn.w_gate) if t is not None):
        return products(g, ffn).to(g.dtype)
    f, d = ffn.w_in.shape
    case = {"arch": launch.arch(g), "d": d, "f": f, "k": k, "dtype": launch.name(g.dtype)}
    inner = linear(
        "linear_in" if ffn.w_gate is None else "linear_gated",
        g,
        ffn.w_in,
        ffn.b_in,
        ffn.activation,
        ffn.w_gate,
        ffn.b_gate,
        case=case,
    )
    return linear("linear_out", inner, ffn.w_out, ffn.b_out, "none", case=case)


def _normalize(y: Tensor, spans: Groups, ffn: FeedForward) -> None:
    """The norm after the residual: real rows of ``y [tokens, d]``, in place."""
    k, d = spans.ratio, y.shape[1]
    case = {"arch": launch.arch(y), "d": d, "k": k, "dtype": launch.name(y.dtype)}
    row = launch.settings("row_norm", **case)
    if spans.launched == 0:
        return
    row_norm_kernel[(triton.cdiv(spans.launched * k, row["bt"]),)](
        y, dense(ffn.norm_weight), dense(ffn.norm_bias),
        spans.start, spans.length, spans.span, spans.mask,
        spans.launched, spans.n, spans.per_row, d, ffn.eps,
        K=k, BT=row["bt"], D2=launch.power_of_2(d), NORM=ffn.norm, FORM=spans.form,
        **launch.options(row),
    )  # fmt: skip


def compressed_ffn(
    x: Tensor,
    plugin: PluginWeights,
    ffn: FeedForward,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, ffn.w_out.dtype)
    x = x.to(dtype)
    d, k, r = x.shape[-1], plugin.ratio, plugin.b1.shape[0]
    spans = groups(x, mask, cu_seqlens, k)
    rows = flat(x)
    y = x.new_empty(x.shape)
    w1u, w1h = plugin.w1.chunk(2, -1)
    merged = x.new_empty(spans.total, d)
    weights = x.new_empty(spans.total, k, dtype=torch.float32)
    projected = x.new_empty(rows.shape[0], r, dtype=torch.float32)
    norm = NO_NORM
    if not ffn.post_norm and ffn.norm != "none":
        norm = Norm(ffn.norm, dense(ffn.norm_weight), dense(ffn.norm_bias), ffn.eps)
    with launch.device_of(x):
        run_merge(
            rows, spans, plugin.merge_weight, plugin.merge_bias.contiguous(), norm, w1h,
            merged, projected, weights,
        )  # fmt: skip
        u = fused_products(merged, ffn, k)
        run_decompress(
            u, spans, plugin.activation, projected, w1u, plugin.b1, plugin.w2, plugin.b2,
            rows if ffn.residual else None, y.view(-1, d), poison=weights,
        )  # fmt: skip
        if ffn.post_norm and ffn.norm != "none":
            _normalize(y.view(-1, d), spans, ffn)
    return y
