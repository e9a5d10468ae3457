"""compressed_ffn on Triton: merge, two products with fused activation, decompress.

What a launch gets besides addresses depends on the forms of its tensors alone; it is worked out
once for calls that look alike (:mod:`..known`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ...triton_kernels import launch
from ...triton_kernels.row_norm import row_norm_kernel
from ..adapter_decompress import triton as decompress
from ..arguments import AdapterWeights, MergeWeights, flat
from ..feed_forward import FeedForward, PluginWeights, products
from ..gpu_arguments import (
    DecompressInputs,
    GpuGroups,
    MergeOutputs,
    contiguous,
    gpu_groups,
    unit_rows,
)
from ..group_merge import triton as merge
from ..groups import Groups
from ..known import Known
from .triton_products import Products, planned_products


class _Planned(NamedTuple):
    """A sublayer's launches for inputs of one form."""

    dtype: torch.dtype
    groups: GpuGroups | None
    """None: they hold tensors, which every call has its own of."""
    as_given: bool
    """Whether the kernels read x and the plugin's weights and the norm's as they are."""
    merge: merge.Launches | None
    products: Products | None
    decompress: launch.Launch | None
    norm: launch.Launch | None


def _norm_behind(y: Tensor, groups: GpuGroups, ffn: FeedForward) -> launch.Launch | None:
    """The norm after the residual: real rows of ``y [tokens, d]``, in place."""
    if not ffn.post_norm or ffn.norm == "none" or groups.launched == 0:
        return None
    k, d = groups.ratio, y.shape[1]
    row = launch.settings("row_norm", **launch.case(y, d, k, launch.tiles(y.shape[0])))
    return launch.Launch(
        row_norm_kernel,
        (launch.cdiv(groups.launched * k, row["bt"]),),
        (*groups.sizes[1:], d, ffn.eps),
        dict(
            K=k, BT=row["bt"], D2=launch.power_of_2(d), NORM=ffn.norm, FORM=groups.form,
            **launch.options(row),
        ),
    )  # fmt: skip


def _key(x: Tensor, groups: Groups) -> Hashable:
    """What launches depend on besides the forms of x and the weights."""
    listed = groups.form == "listed" and groups.start is not None
    counted = groups.start.shape if listed and groups.start is not None else None
    return "triton", groups.form, groups.ratio, counted, *launch.chooses(x)


def compressed_ffn(
    x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups, known: Known | None = None
) -> Tensor:
    """Of arguments whose sizes were checked."""
    key = None if known is None else _key(x, groups)
    planned: _Planned | None = None if known is None else known.plans.get(key)
    given = x, *plugin[:6], ffn.norm_weight, ffn.norm_bias
    dtype = torch.promote_types(x.dtype, ffn.w_out.dtype) if planned is None else planned.dtype
    if planned is None or not planned.as_given:
        x, plugin, ffn = _as_read(x, plugin, ffn, dtype)
    launched = None if planned is None else planned.groups
    launched = launched or gpu_groups(groups, x)
    k, d, r = plugin.ratio, x.shape[-1], plugin.b1.shape[0]
    y, merged = x.new_empty(x.shape), x.new_empty(launched.total, d)
    projected = x.new_empty(*x.shape[:-1], r, dtype=torch.float32)
    softmax = projected.new_empty(launched.total, k)
    w1 = plugin.w1
    w1h = w1.as_strided((r, d), (w1.stride(0), 1), w1.storage_offset() + d)
    weights = MergeWeights(plugin.merge_weight, plugin.merge_bias, w1h)
    out = MergeOutputs(merged, projected, softmax)
    norm = ffn.pre_norm
    residual = x if ffn.residual else None
    with launch.device_of(x):
        if planned is None:
            read = x, *plugin[:6], ffn.norm_weight, ffn.norm_bias
            rows = flat(x)
            inputs = DecompressInputs(merged, projected, rows if ffn.residual else None)
            planned = _Planned(
                dtype,
                launched if groups.form == "plain" else None,
                all(a is b for a, b in zip(given, read, strict=True)),
                merge.launches(rows, launched, weights, norm),
                planned_products(merged, ffn, k),
                decompress.launches(inputs, launched, plugin.adapter, y.view(-1, d)),
                _norm_behind(y.view(-1, d), launched, ffn),
            )
            if known is not None:
                known.keep(key, planned)
        if planned.merge is None or planned.decompress is None:
            return y
        planned.merge.run(x, launched, weights, norm, out)
        if planned.products is not None:
            u = planned.products(merged, ffn)
        else:
            u = products(merged, ffn).to(dtype)
        inputs = DecompressInputs(u, projected, residual, softmax)
        # The first half of W_1 lies where all of it does, in rows as far apart.
        adapter = AdapterWeights(w1, plugin.b1, plugin.w2, plugin.b2, plugin.activation)
        decompress.start(planned.decompress, inputs, launched, adapter, y)
        if planned.norm is not None:
            planned.norm(y, ffn.norm_weight, ffn.norm_bias, *launched.pointers)
    return y


def _as_read(
    x: Tensor, plugin: PluginWeights, ffn: FeedForward, dtype: torch.dtype
) -> tuple[Tensor, PluginWeights, FeedForward]:
    """The same as the kernels read it: rows equally far apart, all numbers of a row together."""
    x = x.to(dtype)
    rows = flat(x)
    if rows.data_ptr() != x.data_ptr():
        x = rows.view(x.shape)
    merge_weight, merge_bias, w1, b1, w2, b2 = plugin[:6]
    plugin = PluginWeights(
        unit_rows(merge_weight), merge_bias.contiguous(), unit_rows(w1), b1.contiguous(),
        unit_rows(w2), b2.contiguous(), plugin.activation,
    )  # fmt: skip
    vectors = contiguous(ffn.norm_weight), contiguous(ffn.norm_bias)
    return x, plugin, ffn._replace(norm_weight=vectors[0], norm_bias=vectors[1])
