"""compressed_ffn on Triton: merge, two products with fused activation, decompress.

The products are Triton's or cuBLAS's (through PyTorch), as the launch table says.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...triton_kernels import launch
from ...triton_kernels.linear import linear_kernel
from ...triton_kernels.row_norm import row_norm_kernel
from ..adapter_decompress.triton import run as run_decompress
from ..arguments import AdapterWeights, MergeWeights, flat
from ..feed_forward import FeedForward, PluginWeights, activate, products
from ..gpu_arguments import (
    DecompressInputs,
    GpuGroups,
    MergeOutputs,
    contiguous,
    contiguous_norm,
    gpu_groups,
    unit_rows,
)
from ..group_merge.triton import run as run_merge
from ..groups import Groups


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
    w, w_gate = unit_rows(w), None if w_gate is None else unit_rows(w_gate)
    operands: tuple[Any, ...] = a, w, w_gate, out
    bm, bn, bk = row["bm"], row["bn"], row["bk"]
    tma = row["tma"] and all(t is None or _describable(t) for t in operands)
    if tma:
        operands = (
            descriptor(a, bm, bk),
            descriptor(w, bn, bk),
            None if w_gate is None else descriptor(w_gate, bn, bk),
            descriptor(out, bm, bn),
        )
    tiles = launch.cdiv(a.shape[0], bm) * launch.cdiv(w.shape[0], bn)
    programs = min(tiles, launch.processors(a) * row["persistent"] or tiles)
    linear_kernel[(programs,)](
        *operands[:3], contiguous(bias), contiguous(gate_bias), operands[3],
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


@functools.cache
def _template(rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(torch.empty(rows, columns), [rows, columns])


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """``TensorDescriptor.from_tensor`` of a matrix that is :func:`_describable`, without its checks
    of that and of the block at every launch."""
    made = object.__new__(TensorDescriptor)
    vars(made).update(vars(_template(rows, columns)))
    made.base, made.shape, made.strides = matrix, matrix.shape, matrix.stride()
    return made


def fused_products(g: Tensor, ffn: FeedForward, k: int) -> Tensor:
    """``FFN(g)`` for ``g [groups, d]``, in g's dtype."""
    if any(t.dtype != g.dtype for t in (ffn.w_in, ffn.w_out, ffn.w_gate) if t is not None):
        return products(g, ffn).to(g.dtype)
    f, d = ffn.w_in.shape
    # Small tiles read their operands four times as often from L2: they pay only where three
    # quarters of the multiprocessors would idle otherwise.
    tiles = launch.cdiv(g.shape[0], 128) * launch.cdiv(f, 256)
    case = launch.case(g, d, k, 4 * tiles, f=f)
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


def _normalize(y: Tensor, groups: GpuGroups, ffn: FeedForward) -> None:
    """The norm after the residual: real rows of ``y [tokens, d]``, in place."""
    k, d = groups.ratio, y.shape[1]
    row = launch.settings("row_norm", **launch.case(y, d, k, launch.tiles(y.shape[0])))
    if groups.launched == 0:
        return
    row_norm_kernel[(launch.cdiv(groups.launched * k, row["bt"]),)](
        y, contiguous(ffn.norm_weight), contiguous(ffn.norm_bias),
        *groups.pointers,
        *groups.sizes[1:], d, ffn.eps,
        K=k, BT=row["bt"], D2=launch.power_of_2(d), NORM=ffn.norm, FORM=groups.form,
        **launch.options(row),
    )  # fmt: skip


def compressed_ffn(x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups) -> Tensor:
    """Of arguments whose sizes were checked."""
    dtype = torch.promote_types(x.dtype, ffn.w_out.dtype)
    x = x.to(dtype)
    # `plugin.merge` and `plugin.adapter`, with one operation for both halves of W_1.
    w1u, w1h = plugin.w1.chunk(2, 1)
    merge = MergeWeights(plugin.merge_weight, plugin.merge_bias.contiguous(), w1h)
    adapter = AdapterWeights(w1u, plugin.b1, plugin.w2, plugin.b2, plugin.activation)
    launched, d = gpu_groups(groups, x), x.shape[-1]
    rows, y = flat(x), x.new_empty(x.shape)
    merged = x.new_empty(launched.total, d)
    softmax = x.new_empty(launched.total, plugin.ratio, dtype=torch.float32)
    projected = x.new_empty(rows.shape[0], merge.bottleneck, dtype=torch.float32)
    with launch.device_of(x):
        out = MergeOutputs(merged, projected, softmax)
        run_merge(rows, launched, merge, contiguous_norm(ffn.pre_norm), out)
        u = fused_products(merged, ffn, plugin.ratio)
        inputs = DecompressInputs(u, projected, rows if ffn.residual else None, softmax)
        run_decompress(inputs, launched, adapter, y.view(-1, d))
        if ffn.post_norm and ffn.norm != "none":
            _normalize(y.view(-1, d), launched, ffn)
    return y
