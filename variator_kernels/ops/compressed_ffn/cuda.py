"""compressed_ffn on CUDA: merge, two products on CUTLASS, decompress; or all in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import extension
from ..adapter_decompress.cuda import Decompress
from ..arguments import flat, require
from ..cuda_arguments import (
    BOTTLENECK_CHUNK,
    DTYPES,
    address,
    aligned,
    code,
    cuda_norm,
    dtype_code,
    groups_kernel,
    multiprocessors,
    target,
)
from ..feed_forward import FeedForward, PluginWeights
from ..gpu_arguments import DecompressInputs, MergeOutputs, gpu_groups
from ..group_merge.cuda import Merge
from ..groups import Groups
from ..known import Known
from .layered import normalize_real

# Up to as many groups the layer is one launch; None: as `one_launch_groups` says.
ONE_LAUNCH_GROUPS: int | None = None


def one_launch_groups(d: int, f: int, products: int, processors: int) -> int:
    """Up to how many groups one launch should take less time than several: by counting alone.

    In one launch each tile of 64 groups reads every weight, and each 64 of its columns the tile's
    rows, from L2: 4·d·f bytes a product, which a multiprocessor is taken to do at 32 GB/s (so many
    the machine code's instructions let through: 70 us for 1,024 groups of T5-base on 132 of them).
    In several, while all tiles of 64 x 128 run at once, a product lasts as long as one of them: its
    2·64·128·K FLOPs at 3.6 TFLOP/s, 60 % of an H200's rate by multiprocessors; besides a gap of
    1.5 us for each launch but the first. None of these numbers was measured on a GPU.
    """
    a_tile = 4 * d * f * products / (32e9 * processors)
    several = 2 * 64 * 128 * ((products - 1) * d + f) / 3.6e12 + 1.5e-6 * (products + 1)
    return 64 * max(1, int(several / a_tile))


def linear(
    a: Tensor, weight: Tensor, bias: Tensor | None, activation: str, factor: Tensor | None = None
) -> Tensor:
    """``act(a · weightᵀ + bias) [* factor]``: ``a [rows, in]``, ``weight [out, in]``; one dtype."""
    out = a.new_empty(a.shape[0], weight.shape[0])
    extension.load("cuda").gemm(
        target(a),
        dtype=dtype_code(a.dtype),
        rows=a.shape[0],
        columns=weight.shape[0],
        inner=a.shape[1],
        a=a.data_ptr(),
        weight=weight.data_ptr(),
        bias=address(bias),
        activation=code("ffn_activations", activation),
        factor=address(factor),
        out=out.data_ptr(),
    )
    return out


def _cast(ffn: FeedForward, dtype: torch.dtype) -> FeedForward:
    """The products' weights in ``dtype``, as the kernels read them."""
    names = ("w_in", "w_out", "w_gate", "b_in", "b_out", "b_gate")
    found = {name: getattr(ffn, name) for name in names}
    cast: dict[str, Any] = {
        name: aligned(t.to(dtype)) for name, t in found.items() if t is not None
    }
    return ffn._replace(**cast)


def compressed_ffn(
    x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups, known: Known | None = None
) -> Tensor:
    """Of arguments whose sizes were checked."""
    dtype = torch.promote_types(x.dtype, ffn.w_out.dtype)
    if dtype not in DTYPES:
        both = f"x is {x.dtype} and w_out {ffn.w_out.dtype}"
        require(False, f"{both}, the CUDA kernels compute in one of {[*DTYPES]}")
    f = ffn.w_in.shape[0]
    require(f % 8 == 0, f"inner size is {f}, the CUDA kernels take multiples of 8")
    x = x.to(dtype)
    launched, d, r = gpu_groups(groups, x), x.shape[-1], plugin.b1.shape[0]
    rows, y = flat(x), x.new_empty(x.shape)
    merged = x.new_empty(launched.total, d)
    projected = x.new_empty(rows.shape[0], r, dtype=torch.float32)
    cast = _cast(ffn, dtype)
    out = MergeOutputs(merged, projected, None)
    kernel = groups_kernel(launched)
    norm = cuda_norm(ffn.pre_norm, dtype)
    merge = Merge(rows, launched, plugin.merge, norm, out, kernel)
    u = torch.empty_like(merged)
    inputs = DecompressInputs(u, projected, rows if ffn.residual else None)
    decompress = Decompress(inputs, launched, plugin.adapter, y.view(-1, d), kernel)
    most = ONE_LAUNCH_GROUPS
    if most is None:
        most = one_launch_groups(d, f, 2 if ffn.w_gate is None else 3, multiprocessors(x))
    _run(x, merge, decompress, u, cast, 0 < launched.total <= most and r <= BOTTLENECK_CHUNK)
    return normalize_real(y, ffn.any_norm, groups) if ffn.post_norm else y


def _run(
    x: Tensor, merge: Merge, decompress: Decompress, u: Tensor, ffn: FeedForward, one_launch: bool
) -> None:
    """All of the sublayer in one call: one launch, or several."""
    cuda = extension.load("cuda")
    count, d = u.shape
    f = ffn.w_in.shape[0]
    inner, gated, partial = u.new_empty(count, f), None, None
    splits = blocks_a_part = 0
    if one_launch:
        processors = multiprocessors(x)
        splits = cuda.splits(count, d, f, processors)
        partial = u.new_empty(splits, count, d, dtype=torch.float32)
        blocks_a_part = cuda.blocks_a_part(count, d, processors)
    elif ffn.w_gate is not None:
        gated = torch.empty_like(inner)
    (cuda.one_launch if one_launch else cuda.launches)(
        target(x),
        merge.params,
        decompress.params,
        f=f,
        w_in=ffn.w_in.data_ptr(),
        w_gate=address(ffn.w_gate),
        w_out=ffn.w_out.data_ptr(),
        b_in=address(ffn.b_in),
        b_gate=address(ffn.b_gate),
        b_out=address(ffn.b_out),
        activation=code("ffn_activations", ffn.activation),
        inner=inner.data_ptr(),
        gated=address(gated),
        partial=address(partial),
        splits=splits,
        u=u.data_ptr(),
        blocks_a_part=blocks_a_part,
    )
