"""compressed_ffn on the CPU: merge, packed products, decompress, block by cache-sized block."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import packing
from ...feed_forward import FeedForward, PluginWeights, products
from ..adapter_decompress.cpu import run as run_decompress
from ..arguments import flat
from ..cpu_arguments import (
    Layout,
    accumulator,
    as_accumulator,
    optional_accumulator,
    pack_columns,
    pack_merge,
)
from ..group_merge.cpu import run as run_merge
from .layered import normalize_real

# Groups that go through the whole layer together: their inner activations (f numbers each) stay in
# the last-level cache, and the products still have rows enough to run at full rate.
BLOCK_GROUPS = 2048


def packed_products(g: Tensor, ffn: FeedForward) -> Tensor:
    """``FFN(g)`` for ``g [rows, d]`` with packed weights, in g's dtype."""
    weights = [w for w in (ffn.w_in, ffn.w_gate, ffn.w_out) if w is not None]
    if not all(packing.can_pack(w) for w in weights):
        return products(g, ffn).to(g.dtype)
    inner = packing.packed_linear(g, ffn.w_in, ffn.b_in, ffn.activation)
    if ffn.w_gate is not None:
        inner = packing.packed_linear_times(g, inner, ffn.w_gate, ffn.b_gate)
    return packing.packed_linear(inner, ffn.w_out, ffn.b_out).to(g.dtype)


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
    y = torch.empty(x.shape, dtype=dtype)
    y_rows = y.view(-1, d)
    layout.copy_padding(rows, y_rows)
    if groups.groups == 0:
        return y
    w1u, w1h, w2, merge_weight = _packed_plugin(plugin, dtype)
    r = plugin.b1.shape[0]
    merge_bias, b1, b2 = (
        as_accumulator(t, dtype) for t in (plugin.merge_bias, plugin.b1, plugin.b2)
    )
    norm_weight, norm_bias = (
        optional_accumulator(t, dtype) for t in (ffn.norm_weight, ffn.norm_bias)
    )
    norm = (
        ("none", None, None, 0.0) if ffn.post_norm else (ffn.norm, norm_weight, norm_bias, ffn.eps)
    )
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
            merge_weight,
            merge_bias,
            w1h,
            r,
            norm,
            merged,
            projected,
            None,
            poison,
        )
        u = packed_products(merged, ffn)
        run_decompress(
            u, groups, span, plugin.activation, projected, w1u, b1, w2, b2, rows, y_rows, poison
        )
    if not ffn.post_norm:
        return y
    return normalize_real(y, ffn, k, mask, cu_seqlens)


def _packed_plugin(
    plugin: PluginWeights, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_1u, W_1h, W_2 and W_c in panels, packed again only when a weight changed."""
    isa = packing.instruction_set()

    def halves() -> tuple[Tensor, Tensor]:
        w1u, w1h = plugin.w1.detach().chunk(2, -1)
        return pack_columns(w1u, dtype, bf16=True), pack_columns(w1h, dtype, bf16=True)

    get = packing.cache.get
    w1u, w1h = get(plugin.w1, ("halves", dtype, isa), halves)
    w2 = get(plugin.w2, ("columns", dtype, isa), lambda: pack_columns(plugin.w2, dtype, bf16=True))
    merge = get(
        plugin.merge_weight, ("merge", dtype, isa), lambda: pack_merge(plugin.merge_weight, dtype)
    )
    return w1u, w1h, w2, merge
