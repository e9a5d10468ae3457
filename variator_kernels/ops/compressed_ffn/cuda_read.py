"""What the CUDA kernels of a sublayer read, as it came or copied to where they can."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import flat
from ..cuda_arguments import (
    address,
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
    norm = ffn.pre_norm[1:3]
    return Read(x, merge_weight, merge_bias, w1, w1, b1, w2, b2, *norm, *ffn[:6])


def as_read(x: Tensor, plugin: PluginWeights, ffn: FeedForward, dtype: torch.dtype) -> Read:
    """All of it as the kernels take it, copied where it must be; ``x`` as ``[tokens, d]``."""
    merge, adapter, r = plugin.merge, plugin.adapter, plugin.b1.shape[0]
    assert merge.projection is not None
    norm = cuda_norm(ffn.pre_norm, dtype)
    products = (None if t is None else aligned(t.to(dtype)) for t in ffn[:6])
    halves = adapter.w1u, merge.projection
    read = [pad_rows(half, dtype) for half in halves]
    if all(a is b for a, b in zip(halves, read, strict=True)):
        read = [plugin.w1, plugin.w1]
    return Read(
        aligned_rows(flat(x.to(dtype))),
        aligned(merge.weight.to(dtype)),
        as_vector(merge.bias, dtype),
        *read,
        as_vector(adapter.b1, dtype, chunks(r)),
        pad_columns(adapter.w2, dtype),
        as_vector(adapter.b2, dtype),
        norm.weight,
        norm.bias,
        *products,
    )


def addresses(read: Read) -> dict[str, int]:
    found = dict(zip(Read._fields, map(address, read), strict=True))
    if read.w1h is read.w1u:
        found["w1h"] += read.x.shape[-1] * read.w1h.element_size()
    return found
