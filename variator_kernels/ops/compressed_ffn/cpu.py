"""compressed_ffn on the CPU: merge, prepacked GEMMs, decompress, block by cache-sized block."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import prepack, prepacked_linear
from ..adapter_decompress import cpu as decompress
from ..arguments import check_adapter, check_ffn, check_merge, flat
from ..cpu_arguments import (
    Listed,
    PrepackedAdapter,
    PrepackedMerge,
    copy_outside,
    listed,
    prepack_adapter,
    prepack_merge,
)
from ..feed_forward import FeedForward, PluginWeights, products
from ..group_merge import cpu as merge
from ..groups import Groups
from ..int8_linear.packed import packed as int8_packed
from ..library import accumulator
from ..row_blocks import blocks
from . import stored
from .layered import normalize_real


def prepacked_products(g: Tensor, ffn: FeedForward) -> Tensor:
    """``FFN(g)`` for a block ``g [rows, d]`` with prepacked weights, in g's dtype."""
    if not ffn.pack:
        return products(g, ffn, prepacked_linear.unpacked).to(g.dtype)
    dtype = g.dtype
    if stored.holds(ffn):
        w_in, w_out, w_gate = stored.packed(ffn, dtype)
        types = dtype, dtype
    else:
        pack: Any = functools.partial(prepack.linear, rows=g.shape[0])
        pack = int8_packed if ffn.precision == "int8" else pack
        w_in, w_out = pack(ffn.w_in, ffn.b_in), pack(ffn.w_out, ffn.b_out)
        w_gate = None if ffn.w_gate is None else pack(ffn.w_gate, ffn.b_gate)
        types = ffn.w_in.dtype, ffn.w_out.dtype
    if w_in is None or w_out is None or (w_gate is None) != (ffn.w_gate is None):
        return products(g, stored.dequantised(ffn, dtype)).to(dtype)
    g = g.to(prepack.product_dtype(types[0]))
    inner = w_in.block(g, ffn.activation)
    if w_gate is not None:
        inner = w_gate.times(g, inner)
    return w_out.block(inner.to(prepack.product_dtype(types[1]))).to(dtype)


def compressed_ffn(x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups) -> Tensor:
    dtype = torch.promote_types(x.dtype, ffn.w_out.dtype)
    x = x.to(dtype)
    check_ffn(x.shape[-1], ffn[:6], ffn.any_norm)
    rows, d = flat(x), x.shape[-1]
    lists = listed(groups, rows.shape[0], compact=True)
    fresh = torch.empty if ffn.residual or lists.covers_all else torch.zeros
    y = fresh(x.shape, dtype=dtype)
    y_rows = y.view(-1, d)
    residual = rows if ffn.residual else None
    if residual is not None:
        copy_outside(lists, rows, y_rows)
    total = lists.kernel.count
    if total == 0:
        return y
    packed, wide = _prepacked_plugin(x, plugin, ffn, groups), accumulator(dtype)
    projected = torch.empty(rows.shape[0], packed.merge.bottleneck, dtype=wide)
    for first, count, size in blocks(total, groups.kept is not None):
        block = Listed(lists.kernel.part(first, count), lists.tensors, lists.covers_all)
        merged = torch.empty(size, d, dtype=dtype)
        merged[count:].zero_()
        # oneDNN's activations turn NaN into 0; what the merge saw is carried past them.
        poison = torch.empty(count, dtype=wide)
        merge.run(rows, block, packed.merge, merge.Outputs(merged, projected, None, poison))
        # Only oneDNN's products have few sizes.
        u = prepacked_products(merged[:count] if ffn.precision == "int8" else merged, ffn)
        inputs = decompress.Inputs(u, projected, residual, poison)
        decompress.run(inputs, block, packed.adapter, y_rows)
    return normalize_real(y, ffn.any_norm, groups) if ffn.post_norm else y


class PrepackedPlugin(NamedTuple):
    """A plugin's weights as the kernels read them."""

    merge: PrepackedMerge
    adapter: PrepackedAdapter


def _prepacked_plugin(
    x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups
) -> PrepackedPlugin:
    """For ``x``'s dtype; packed, and checked, again only when a weight changed."""
    norm, dtype, isa = ffn.pre_norm, x.dtype, prepack.instruction_set()
    sources = (*plugin[:6], *(t for t in (norm.weight, norm.bias) if t is not None))

    def make(*copies: Tensor) -> PrepackedPlugin:
        # Nothing that is read by address is of another size: shapes are part of the cache's key.
        own = PluginWeights._make([*copies[:6], plugin.activation])
        vectors = iter(copies[6:])
        weight = None if norm.weight is None else next(vectors)
        bias = None if norm.bias is None else next(vectors)
        its = norm._replace(weight=weight, bias=bias)
        check_merge(x, own.merge, groups, its)
        check_adapter(own.adapter, x.shape[-1], own.b1.shape[0])
        return PrepackedPlugin(
            prepack_merge(own.merge, its, dtype, isa), prepack_adapter(own.adapter, dtype, isa)
        )

    form = (
        "plugin",
        dtype,
        x.shape[-1],
        groups.ratio,
        norm.name,
        norm.bias is None,
        norm.eps,
        plugin.activation,
        isa,
    )
    return prepack.cache.get(sources, form, make)
