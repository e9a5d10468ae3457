"""A self-attention sublayer in one call of the extension (csrc/cpu/sublayer.h), where all of its
products are this package's own."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import extension
from .. import own_products, prepack
from ..arguments import NO_NORM, MergeWeights, check_merge, flat, norm_form, norm_of, require
from ..cpu_arguments import dtype_code, norm_kernel, wide_norm
from ..group_merge import cpu as group_merge
from ..grouped_attention import cpu as attention_cpu
from ..grouped_attention.kernel_checks import check_keys
from ..grouped_attention.reference import Visible
from ..groups import Groups
from ..listed import listed
from ..transforms import nothing_between
from .description import SelfAttention
from .keys import Keys


def at_once(
    x: Tensor,
    a: SelfAttention,
    keys: Keys,
    merge: MergeWeights | None = None,
    groups: Groups | None = None,
) -> Tensor | None:
    """``x + o``, or o without a residual, and its norm behind: of ``x [B, n, d]``, with keys and
    values of tokens, or of vectors that ``merge`` makes of ``groups``; then tokens of no group come
    out as they were, if there is a residual. None where it does not run so."""
    if a.q_norm is not None or a.k_norm is not None or x.shape[1] >= 2**24:
        return None
    visible, relative = Visible(keys.bias, keys.first, keys.last), keys.relative
    if not nothing_between((x, *visible, *(() if relative is None else relative[:4]))):
        return None
    rows, isa = flat(x), prepack.instruction_set()
    batch, n = x.shape[:2]
    count = n if groups is None else groups.shape(x)[1]
    if a.precision is None:
        weights = a.w_q, a.w_k, a.w_v, a.w_o
        if not own_products.takes((batch * n, batch * count), weights, x.dtype, isa):
            return None
    whole = _whole(x, a, isa, merge, groups)
    if whole is None:
        return None
    heads, kv_heads = a.w_q.shape[0] // a.head_size, a.w_k.shape[0] // a.head_size
    check_keys(visible, relative, (batch, n, count, heads), x.device)
    sizes = batch, n, count, heads, kv_heads, a.head_size
    given, kept = attention_cpu.given(sizes, x.dtype, visible, relative, a.scale)
    lists = None if groups is None else listed(groups, rows.shape[0])
    rows = rows.contiguous() if a.residual else rows
    y = torch.empty(x.shape, dtype=x.dtype)
    whole.kernel.run(
        given=given,
        groups=None if lists is None else lists.kernel,
        outside=lists is not None and not lists.covers_all,
        x=rows.data_ptr(),
        x_stride=rows.stride(0),
        y=y.data_ptr(),
    )
    del kept  # until here the kernels read them
    return y


def _whole(
    x: Tensor, a: SelfAttention, isa: str, merge: MergeWeights | None, groups: Groups | None
) -> own_products.Own | None:
    norm, dtype, d = NO_NORM if a.norm == "none" else a.any_norm, x.dtype, x.shape[-1]
    weights, biases = (a.w_q, a.w_k, a.w_v), (a.b_q, a.b_k, a.b_v)
    vectors = tuple(t for t in (norm.weight, norm.bias) if t is not None)
    of_merge = () if merge is None else (merge.weight, merge.bias)
    given = tuple(t for t in (*weights, a.w_o, *biases, a.b_o, *of_merge) if t is not None)

    def make(*copies: Tensor) -> own_products.Own | None:
        a.check(x)
        heads, kv_heads = a.w_q.shape[0] // a.head_size, a.w_k.shape[0] // a.head_size
        require(kv_heads > 0 and heads % kv_heads == 0, f"{kv_heads} heads of keys for {heads}")
        first = len(weights) if merge is None else 1
        products = [
            own_products.stacked(*some, a.precision, dtype, isa)
            for some in (
                (weights[:first], biases[:first]),
                *([] if merge is None else [(weights[1:], biases[1:])]),
                ((a.w_o,), (a.b_o,)),
            )
        ]
        linear = [own_products.linear(product) for product in products]
        if any(one is None for one in linear):
            return None
        packed = known = None
        if merge is not None and groups is not None:
            check_merge(x, merge, groups, a.pre_norm)
            packed = group_merge.prepacked(merge, a.pre_norm, dtype, isa)
            known = group_merge.known(packed, dtype, groups.ratio, d)
        its = wide_norm(norm_of(norm, copies[len(given) :]), dtype)
        kernel = extension.load().AttentionSublayer(
            isa=isa,
            dtype=dtype_code(dtype),
            path=extension.enum_value("cpu", "attention_paths", attention_cpu.PATH),
            heads=heads,
            kv_heads=kv_heads,
            head_size=a.head_size,
            scale=a.scale,
            w_in=linear[0],
            w_kv=None if merge is None else linear[1],
            w_o=linear[-1],
            merge=known,
            norm=norm_kernel(NO_NORM if a.post_norm else its),
            behind=norm_kernel(its if a.post_norm else NO_NORM),
            residual=a.residual,
        )
        return own_products.Own(kernel, its, packed, products)

    absent = tuple(t is None for t in (*biases, a.b_o))
    ratio = None if groups is None else groups.ratio
    settings = a.head_size, a.scale, a.precision, a.residual, a.post_norm, attention_cpu.PATH
    form = "attention", dtype, d, ratio, *norm_form(norm), absent, *settings, isa
    return prepack.cache.get((*given, *vectors), form, make)
