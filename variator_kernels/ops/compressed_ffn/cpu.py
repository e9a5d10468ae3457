"""compressed_ffn on the CPU: merge, packed products, decompress, block by cache-sized block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import prepack
from ..adapter_decompress.cpu import run as run_decompress
from ..arguments import Norm, flat
from ..cpu_arguments import (
    Layout,
    accumulator,
    as_accumulator,
    folded,
    optional_accumulator,
    pack_columns,
    pack_merge,
)
from ..feed_forward import FeedForward, PluginWeights, products
from ..group_merge.cpu import run as run_merge
from .layered import normalize_real

# Groups that go through the whole layer together: their inner activations (f numbers each) stay in
# the last-level cache, and the products still have rows enough to run at full rate.
BLOCK_GROUPS = 2048


def packed_products(g: Tensor, ffn: FeedForward) -> Tensor:
    """``FFN(g)`` for ``g [rows, d]`` with packed weights, in g's dtype."""
    w_in, w_out = prepack.linear(ffn.w_in, ffn.b_in), prepack.linear(ffn.w_out, ffn.b_out)
    w_gate = None if ffn.w_gate is None else prepack.linear(ffn.w_gate, ffn.b_gate)
    if w_in is None or w_out is None or (w_gate is None) != (ffn.w_gate is None):
        return products(g, ffn).to(g.dtype)
    dtype = g.dtype
    g = g.to(prepack.product_dtype(ffn.w_in.dtype))
    inner = w_in(g, ffn.activation)
    if w_gate is not None:
        inner = w_gate.times(g, inner)
    return w_out(inner.to(prepack.product_dtype(ffn.w_out.dtype))).to(dtype)


def compressed_ffn(
    x: Tensor,
    plugin: PluginWeights,
    ffn: FeedForward,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, ffn.w_out.dtype)
    x = x.to(dtype)
    d, k = x.shape[-1], plugin.ratio
    layout = Layout(x, mask, cu_seqlens)
    groups = layout.groups(k, compact=True)
    rows = flat(x)
    fresh = torch.empty if ffn.residual or layout.covers_all else torch.zeros
    y = fresh(x.shape, dtype=dtype)
    y_rows = y.view(-1, d)
    if ffn.residual:
        layout.copy_padding(rows, y_rows)
    if groups.groups == 0:
        return y
    packed = _packed_plugin(plugin, ffn, dtype)
    r = plugin.b1.shape[0]
    wide = accumulator(dtype)
    projected = torch.empty(rows.shape[0], r, dtype=wide)
    for first in range(0, groups.groups, BLOCK_GROUPS):
        span = (first, min(BLOCK_GROUPS, groups.groups - first))
        merged = torch.empty(span[1], d, dtype=dtype)
        # oneDNN's activations turn NaN into 0; what the merge saw is carried past them.
        poison = torch.empty(span[1], dtype=wide)
        run_merge(
            rows,
            groups,
            span,
            packed.merge_weight,
            packed.merge_bias,
            packed.w1h,
            r,
            packed.norm,
            merged,
            projected,
            None,
            poison,
        )
        u = packed_products(merged, ffn)
        run_decompress(
            u,
            groups,
            span,
            plugin.activation,
            projected,
            packed.w1u,
            packed.b1,
            packed.w2,
            packed.b2,
            rows if ffn.residual else None,
            y_rows,
            poison,
        )
    if not ffn.post_norm:
        return y
    return normalize_real(y, ffn, k, mask, cu_seqlens)


class PackedPlugin(NamedTuple):
    """A plugin's weights as the kernels read them, the norm before them folded in if it folds."""

    merge_weight: Tensor
    merge_bias: Tensor
    w1u: Tensor
    w1h: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    norm: Norm


def _packed_plugin(plugin: PluginWeights, ffn: FeedForward, dtype: torch.dtype) -> PackedPlugin:
    """Packed again only when a weight changed."""
    kind = "none" if ffn.post_norm else ffn.norm
    used = () if kind == "none" else (ffn.norm_weight, ffn.norm_bias)
    sources = (*plugin[:6], *(t for t in used if t is not None))

    def make() -> PackedPlugin:
        weight, bias = (optional_accumulator(t, dtype) for t in used or (None, None))
        norm = Norm(kind, weight, bias, ffn.eps)
        w1u, w1h = plugin.w1.detach().chunk(2, -1)
        return PackedPlugin(
            pack_merge(folded(plugin.merge_weight, norm, dtype), dtype),
            as_accumulator(plugin.merge_bias, dtype),
            pack_columns(w1u, dtype, bf16=True),
            pack_columns(folded(w1h, norm, dtype), dtype, bf16=True),
            as_accumulator(plugin.b1, dtype),
            pack_columns(plugin.w2, dtype, bf16=True),
            as_accumulator(plugin.b2, dtype),
            norm,
        )

    form = ("plugin", dtype, kind, ffn.norm_bias is None, ffn.eps, prepack.instruction_set())
    return prepack.cache.get(sources, form, make)
