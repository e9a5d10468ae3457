"""What the CUDA kernels of a sublayer read, as it came or copied to where they can."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import flat
from ..cuda_arguments import (
    aligned,
    aligned_rows,
    as_vector,
    chunks,
    cuda_norm,
    pad_columns,
    pad_rows,
)
from ..feed_forward import FeedForward, PluginWeights


class Read(NamedTuple):
    """What the kernels read, by the names of the extension's arguments."""

    x: Tensor
    merge_weight: Tensor
    merge_bias: Tensor
    w1u: Tensor
    w1h: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    w_in: Tensor
    w_out: Tensor
    w_gate: Tensor | None
    b_in: Tensor | None
    b_out: Tensor | None
    b_gate: Tensor | None


def read_as_given(x: Tensor, plugin: PluginWeights, ffn: FeedForward) -> Read:
    """All of it as it came; W_1h is a part of W_1."""
    merge_weight, merge_bias, w1, b1, w2, b2, _ = plugin
    w_in, w_out, w_gate, b_in, b_out, b_gate, *_ = ffn
    _, scale, shift, _ = ffn.pre_norm
    return Read(
        x, merge_weight, merge_bias, w1, w1, b1, w2, b2, scale, shift,
        w_in, w_out, w_gate, b_in, b_out, b_gate,
    )  # fmt: skip


def as_read(x: Tensor, plugin: PluginWeights, ffn: FeedForward, dtype: torch.dtype) -> Read:
    """All of it as the kernels take it, copied where it must be; ``x`` as ``[tokens, d]``."""
    merge, adapter, r = plugin.merge, plugin.adapter, plugin.b1.shape[0]
    assert merge.projection is not None
    halves = adapter.w1u, merge.projection
    w1u, w1h = (pad_rows(half, dtype) for half in halves)
    if w1u is halves[0] and w1h is halves[1]:
        w1u = w1h = plugin.w1
    norm = cuda_norm(ffn.pre_norm, dtype)

    def optional(t: Tensor | None) -> Tensor | None:
        return None if t is None else aligned(t.to(dtype))

    return Read(
        aligned_rows(flat(x.to(dtype))),
        aligned(merge.weight.to(dtype)),
        as_vector(merge.bias, dtype),
        w1u,
        w1h,
        as_vector(adapter.b1, dtype, chunks(r)),
        pad_columns(adapter.w2, dtype),
        as_vector(adapter.b2, dtype),
        norm.weight,
        norm.bias,
        aligned(ffn.w_in.to(dtype)),
        aligned(ffn.w_out.to(dtype)),
        optional(ffn.w_gate),
        optional(ffn.b_in),
        optional(ffn.b_out),
        optional(ffn.b_gate),
    )


def addresses(read: Read) -> dict[str, int]:
    places = [0 if tensor is None else tensor.data_ptr() for tensor in read]
    found = dict(zip(Read._fields, places, strict=True))
    if read.w1h is read.w1u:
        found["w1h"] += read.x.shape[-1] * read.w1h.element_size()
    return found
