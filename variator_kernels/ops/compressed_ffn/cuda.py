"""compressed_ffn on CUDA: merge, two products on CUTLASS, decompress; or all in one launch.

A sublayer is one call of the extension, on an object that is made once for calls whose tensors look
alike (:mod:`..known`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import extension
from ..arguments import require
from ..cuda_arguments import (
    BOTTLENECK_CHUNK,
    DTYPES,
    address,
    check_sizes,
    chunks,
    code,
    dtype_code,
    groups_kernel,
    multiprocessors,
    norm_kernel,
    target,
    vector,
)
from ..feed_forward import FeedForward, PluginWeights
from ..gpu_arguments import GpuGroups, gpu_groups
from ..groups import Groups
from ..known import Known
from .cuda_read import Read, addresses, as_read, read_as_given
from .layered import normalize_real

# Whether each buffer between two kernels is an allocation of its own, as a sanitizer wants it: in
# a shared one, writing beyond the end of a buffer is no error.
BUFFERS_APART = False
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


class _Planned(NamedTuple):
    """A sublayer of inputs of one form."""

    dtype: torch.dtype
    groups: GpuGroups | None
    """None: they hold tensors, which every call has its own of."""
    as_given: bool
    """Whether the kernels read x and the weights as they are, if all start at 16 bytes."""
    strides: tuple[int, ...]
    """Of rows of what is read."""
    kernel: Any
    """The extension's ``Sublayer``."""
    splits: int
    """Of one launch; 0 where there are several."""


def _plan(
    read: Read, launched: GpuGroups, r: int, ffn: FeedForward, phi: str, as_given: bool
) -> _Planned:
    cuda, x = extension.load("cuda"), read.x
    (f, d), k = read.w_in.shape, launched.ratio
    check_sizes(d, k, r)
    found, groups = addresses(read), groups_kernel(launched)
    common: dict[str, Any] = {
        "dtype": dtype_code(x.dtype), "groups": groups, "d": d, "r": chunks(r),
        "projected": 0, "projected_columns": r,
    }  # fmt: skip
    norm = ffn.pre_norm._replace(weight=read.norm_weight, bias=read.norm_bias)
    merge = cuda.Merge(
        **common, x=found["x"], x_stride=x.stride(0), norm=norm_kernel(norm),
        merge_weight=found["merge_weight"], merge_bias=vector(read.merge_bias),
        projection=found["w1h"], projection_stride=read.w1h.stride(0), merged=0, weights=0,
    )  # fmt: skip
    decompress = cuda.Decompress(
        **common, phi=code("adapter_activations", phi), u=0, w1u=found["w1u"],
        w1u_stride=read.w1u.stride(0), b1=vector(read.b1), w2=found["w2"], b2=vector(read.b2),
        residual=found["x"] if ffn.residual else 0, residual_stride=x.stride(0), y=0,
    )  # fmt: skip
    processors, count = multiprocessors(x), launched.total
    most = ONE_LAUNCH_GROUPS
    if most is None:
        most = one_launch_groups(d, f, 2 if ffn.w_gate is None else 3, processors)
    one_launch = 0 < count <= most and r <= BOTTLENECK_CHUNK
    splits = cuda.splits(count, d, f, processors) if one_launch else 0
    kernel = cuda.Sublayer(
        merge=merge, decompress=decompress, f=f,
        activation=code("ffn_activations", ffn.activation), one_launch=one_launch, splits=splits,
        blocks_a_part=cuda.blocks_a_part(count, d, processors) if one_launch else 0,
    )  # fmt: skip
    plain = launched if launched.form == "plain" else None
    return _Planned(x.dtype, plain, as_given, _strides(read), kernel, splits)


def _strides(read: Read) -> tuple[int, ...]:
    """Those that a plan keeps."""
    return read.x.stride(0), read.w1u.stride(0), read.w1h.stride(0)


def _key(groups: Groups) -> Hashable:
    """What a sublayer depends on besides the forms of x and the weights."""
    counted = None
    if groups.form == "listed" and groups.start is not None:
        counted = groups.start.shape
    return "cuda", groups.form, groups.ratio, counted, ONE_LAUNCH_GROUPS


def _dtype(x: Tensor, ffn: FeedForward) -> torch.dtype:
    """In which the kernels compute, where they do."""
    dtype = torch.promote_types(x.dtype, ffn.w_out.dtype)
    if dtype not in DTYPES:
        both = f"x is {x.dtype} and w_out {ffn.w_out.dtype}"
        require(False, f"{both}, the CUDA kernels compute in one of {[*DTYPES]}")
    f = ffn.w_in.shape[0]
    require(f % 8 == 0, f"inner size is {f}, the CUDA kernels take multiples of 8")
    return dtype


def _workspace(like: Tensor, sizes: tuple[int, ...]) -> tuple[list[int], list[Tensor]]:
    """Addresses of buffers of so many elements, 0 for none, and what holds them: one allocation,
    which takes longer than a kernel's arguments do. All but the last are whole multiples of 16
    bytes, so that each begins at one."""
    if BUFFERS_APART:
        parts = [like.new_empty(size) for size in sizes]
        return [part.data_ptr() if part.numel() else 0 for part in parts], parts
    whole = like.new_empty(sum(sizes))
    place, item, found = whole.data_ptr(), whole.element_size(), []
    for size in sizes:
        found.append(place if size else 0)
        place += item * size
    return found, [whole]


def compressed_ffn(
    x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups, known: Known | None = None
) -> Tensor:
    """Of arguments whose sizes were checked."""
    key = _key(groups)
    planned: _Planned | None = None if known is None else known.plans.get(key)
    given = read_as_given(x, plugin, ffn)
    read, found = given, {}
    if planned is not None and planned.as_given:
        found = addresses(given)
        bits = 0
        for place in found.values():
            bits |= place
        if bits % 16:
            key = key, "copied"  # what is read lies otherwise
            planned = None if known is None else known.plans.get(key)
    if planned is None or not planned.as_given:
        read = as_read(x, plugin, ffn, _dtype(x, ffn))
        found = addresses(read)
        # What is copied depends on where it lies, which is no part of its form.
        if planned is not None and planned.strides != _strides(read):
            planned = None
    launched = None if planned is None else planned.groups
    launched = launched or gpu_groups(groups, x)
    r, d, f = plugin.b1.shape[0], x.shape[-1], ffn.w_in.shape[0]
    if planned is None:
        as_given = all(a is b for a, b in zip(read[1:], given[1:], strict=True))
        same = x.dtype == read.x.dtype and x.data_ptr() == read.x.data_ptr()
        as_given = as_given and same
        planned = _plan(read, launched, r, ffn, plugin.activation, as_given)
        if known is not None:
            known.keep(key, planned)
    y, count = read.x.new_empty(x.shape), launched.total
    gate = ffn.w_gate is not None and planned.splits == 0
    sizes = count * d, count * d, count * f, gate * count * f
    (merged, u, inner, gated), between = _workspace(y, sizes)
    wide = y.new_empty(0, dtype=torch.float32)
    tokens = y.numel() // max(d, 1)
    (partial, projected), sums = _workspace(wide, (planned.splits * count * d, tokens * r))
    planned.kernel.run(
        target(x),
        **found,
        start=address(launched.start),
        span=address(launched.span),
        owned=address(launched.owned),
        mask=address(launched.mask),
        kept=address(launched.kept),
        merged=merged,
        projected=projected,
        inner=inner,
        gated=gated,
        partial=partial,
        u=u,
        y=y.data_ptr(),
    )
    del between, sums  # not before the launches
    return normalize_real(y, ffn.any_norm, groups) if ffn.post_norm else y
