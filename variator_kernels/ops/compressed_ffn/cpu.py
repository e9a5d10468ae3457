"""compressed_ffn on the CPU: merge, prepacked GEMMs, decompress, block by cache-sized block."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import extension
from .. import own_products, prepack, prepacked_linear
from ..adapter_decompress import cpu as decompress
from ..arguments import (
    NO_NORM,
    Norm,
    check_adapter,
    check_ffn,
    check_merge,
    flat,
    norm_form,
    norm_of,
)
from ..cpu_arguments import (
    PrepackedAdapter,
    PrepackedMerge,
    norm_kernel,
    prepack_adapter,
    prepack_merge,
    wide_norm,
)
from ..feed_forward import FeedForward, PluginWeights, products
from ..group_merge import cpu as merge
from ..groups import Groups
from ..int8_linear.packed import packed as int8_packed
from ..library import accumulator
from ..listed import Listed, copy_outside, listed
from ..row_blocks import blocks
from . import stored
from .layered import normalize_real


def prepacked_products(g: Tensor, ffn: FeedForward, isa: str) -> Tensor:
    """``FFN(g)`` for a block ``g [rows, d]`` with prepacked weights, in g's dtype."""
    if not ffn.pack:
        return products(g, ffn, prepacked_linear.unpacked).to(g.dtype)
    dtype, rows = g.dtype, g.shape[0]
    if stored.holds(ffn):
        w_in, w_out, w_gate = stored.packed(ffn, dtype, isa)
        wide = outer = prepack.product_dtype(dtype)
    else:
        pack: Any
        if ffn.precision == "int8":  # which takes vectors of any dtype
            pack, wide, outer = functools.partial(int8_packed, isa=isa), dtype, dtype
        else:
            pack = functools.partial(prepack.linear, rows=rows)
            wide, outer = (prepack.product_dtype(w.dtype, rows) for w in (ffn.w_in, ffn.w_out))
        w_in, w_out = pack(ffn.w_in, ffn.b_in), pack(ffn.w_out, ffn.b_out)
        w_gate = None if ffn.w_gate is None else pack(ffn.w_gate, ffn.b_gate)
    if w_in is None or w_out is None or (w_gate is None) != (ffn.w_gate is None):
        return products(g, stored.dequantised(ffn, dtype)).to(dtype)
    g = g.to(wide)
    inner = w_in.block(g, ffn.activation)
    if w_gate is not None:
        inner = w_gate.times(g, inner)
    return w_out.block(inner.to(outer)).to(dtype)


def _runs_at_once(ffn: FeedForward, rows: int, dtype: torch.dtype, isa: str) -> bool:
    """Whether the products with ``rows`` vectors, or any part of them, are this package's own,
    unless a weight is not finite."""
    if not ffn.pack or dtype not in own_products.DTYPES:
        return False
    kept = stored.holds(ffn)
    if not kept and any(w.dtype != dtype for w in own_products.weights(ffn)):
        return False
    if ffn.precision == "int8":  # weights that came so may be packed in the dtype of products
        return not kept or prepack.product_dtype(dtype) == dtype
    if kept or prepacked_linear.shares():
        return False
    return own_products.takes((rows,), own_products.weights(ffn), dtype, isa)


def compressed_ffn(x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups) -> Tensor:
    dtype = torch.promote_types(x.dtype, ffn.w_out.dtype)
    x = x.to(dtype)
    rows, d = flat(x), x.shape[-1]
    lists = listed(groups, rows.shape[0], compact=True)
    fresh = torch.empty if ffn.residual or lists.covers_all else torch.zeros
    y = fresh(x.shape, dtype=dtype)
    total, isa = lists.kernel.count, prepack.instruction_set()
    if total == 0:
        if ffn.residual:
            copy_outside(lists, rows, y.view(-1, d))
        return y
    whole = None
    if _runs_at_once(ffn, total, dtype, isa):
        whole = _whole(x, plugin, ffn, groups, isa)
    if whole is not None:
        whole.kernel.run(
            threads=torch.get_num_threads(),
            groups=lists.kernel,
            outside=not lists.covers_all,
            tokens=rows.shape[0],
            x=rows.data_ptr(),
            x_stride=rows.stride(0),
            y=y.data_ptr(),
        )
        if ffn.residual:
            return y
    else:
        check_ffn(d, ffn[:6], ffn.any_norm)
        packed = _prepacked_plugin(x, plugin, ffn, groups, isa)
        _in_steps(rows, y.view(-1, d), lists, packed, ffn, groups.kept is not None)
    return normalize_real(y, ffn.any_norm, groups) if ffn.post_norm else y


def _in_steps(
    rows: Tensor, y_rows: Tensor, lists: Listed, packed: PrepackedPlugin, ffn: FeedForward,
    kept: bool,
) -> None:  # fmt: skip
    """The same kernel by kernel, with products of other libraries."""
    dtype, total, d = rows.dtype, lists.kernel.count, rows.shape[1]
    isa, wide = packed.merge.isa, accumulator(dtype)
    residual = rows if ffn.residual else None
    if residual is not None:
        copy_outside(lists, rows, y_rows)
    projected = torch.empty(rows.shape[0], packed.merge.bottleneck, dtype=wide)
    any_size = ffn.precision == "int8"  # only oneDNN's products have few sizes
    for first, count, size in blocks(total, kept):
        block = Listed(lists.kernel.part(first, count), lists.tensors, lists.covers_all)
        merged = torch.empty(size, d, dtype=dtype)
        merged[count:].zero_()
        # oneDNN's activations turn NaN into 0; what the merge saw is carried past them.
        poison = torch.empty(count, dtype=wide)
        merge.run(rows, block, packed.merge, merge.Outputs(merged, projected, None, poison))
        u = prepacked_products(merged[:count] if any_size else merged, ffn, isa)
        inputs = decompress.Inputs(u, projected, residual, poison)
        decompress.run(inputs, block, packed.adapter, y_rows)


class PrepackedPlugin(NamedTuple):
    """A plugin's weights as the kernels read them."""

    merge: PrepackedMerge
    adapter: PrepackedAdapter


def _of_plugin(plugin: PluginWeights, norm: Norm) -> tuple[Tensor, ...]:
    return (*plugin[:6], *(t for t in (norm.weight, norm.bias) if t is not None))


def _form(x: Tensor, plugin: PluginWeights, norm: Norm, ratio: int, isa: str) -> tuple:
    return x.dtype, x.shape[-1], ratio, *norm_form(norm), plugin.activation, isa


def _prepacked_plugin(
    x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups, isa: str
) -> PrepackedPlugin:
    """For ``x``'s dtype; packed, and checked, again only when a weight changed."""
    norm, dtype = ffn.pre_norm, x.dtype

    def make(*copies: Tensor) -> PrepackedPlugin:
        # Nothing that is read by address is of another size: shapes are part of the cache's key.
        own = PluginWeights._make([*copies[:6], plugin.activation])
        its = norm_of(norm, copies[6:])
        check_merge(x, own.merge, groups, its)
        check_adapter(own.adapter, x.shape[-1], own.b1.shape[0])
        return PrepackedPlugin(
            prepack_merge(own.merge, its, dtype, isa), prepack_adapter(own.adapter, dtype, isa)
        )

    form = "plugin", *_form(x, plugin, norm, groups.ratio, isa)
    return prepack.cache.get(_of_plugin(plugin, norm), form, make)


def _whole(
    x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups, isa: str
) -> own_products.Own | None:
    """What runs the sublayer, a norm behind only with a residual (or padding would get it too);
    None where a product is not this package's own. All of its weights are looked up at once, and
    packed each for itself: ratios share an FFN's."""
    norm, d = ffn.pre_norm, x.shape[-1]
    behind = ffn.any_norm if ffn.post_norm and ffn.norm != "none" else NO_NORM
    vectors = tuple(t for t in (behind.weight, behind.bias) if t is not None)

    def make(*copies: Tensor) -> own_products.Own | None:
        check_ffn(d, ffn[:6], ffn.any_norm)
        packed, adapter = _prepacked_plugin(x, plugin, ffn, groups, isa)
        products = own_products.products(ffn, x.dtype, isa)
        if products is None:
            return None
        its = wide_norm(norm_of(behind, copies[len(copies) - len(vectors) :]), x.dtype)
        kernel = extension.load().CompressedFfn(
            isa=isa,
            merge=merge.known(packed, x.dtype, groups.ratio, d),
            products=products.kernel,
            phi=adapter.phi,
            w1u=adapter.w1u.data_ptr(),
            b1=adapter.b1.data_ptr(),
            w2=adapter.w2.data_ptr(),
            b2=adapter.b2.data_ptr(),
            behind=norm_kernel(its if ffn.residual else NO_NORM),
            residual=ffn.residual,
        )
        return own_products.Own(kernel, packed, adapter, products, its)

    form = (
        *("whole", *_form(x, plugin, norm, groups.ratio, isa), *own_products.form(ffn)),
        *norm_form(behind),
    )
    sources = (*_of_plugin(plugin, norm), *own_products.sources(ffn), *vectors)
    return prepack.cache.get(sources, form, make)
