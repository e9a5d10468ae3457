"""adapter_decompress on the CPU kernels (csrc/cpu/decompress.h, decompress_backward.h)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import extension
from .. import prepack
from ..arguments import AdapterWeights, check_decompress, flat, require
from ..cpu_arguments import (
    PrepackedAdapter,
    address,
    as_accumulator,
    dtype_code,
    pack_columns,
    pack_rows,
    prepack_adapter,
)
from ..groups import Groups
from ..library import accumulator
from ..listed import Listed, copy_outside, listed


class Inputs(NamedTuple):
    """What a decompress reads: contiguous ``u [groups, d]`` and ``projected [tokens, r]`` (in the
    accumulator dtype); ``residual [tokens, d]``; ``poison [groups]``, added to u: NaN where the
    merge saw NaN."""

    u: Tensor
    projected: Tensor
    residual: Tensor | None = None
    poison: Tensor | None = None


def run(inputs: Inputs, groups: Listed, adapter: PrepackedAdapter, y: Tensor) -> None:
    """Writes the tokens of the groups to flat ``y [tokens, d]``."""
    residual = inputs.residual
    extension.load().Decompress(
        isa=adapter.isa,
        dtype=dtype_code(y.dtype),
        threads=torch.get_num_threads(),
        groups=groups.kernel,
        d=y.shape[-1],
        r=adapter.b1.shape[0],
        phi=adapter.phi,
        u=inputs.u.data_ptr(),
        projected=inputs.projected.data_ptr(),
        w1u=adapter.w1u.data_ptr(),
        b1=adapter.b1.data_ptr(),
        w2=adapter.w2.data_ptr(),
        b2=adapter.b2.data_ptr(),
        poison=address(inputs.poison),
        residual=address(residual),
        residual_stride=0 if residual is None else residual.stride(0),
        y=y.data_ptr(),
    ).run()


def adapter_decompress(
    u: Tensor,
    projected: Tensor,
    adapter: AdapterWeights,
    residual: Tensor | None,
    groups: Groups,
) -> Tensor:
    dtype = u.dtype
    check_decompress(u, projected, adapter, groups)
    shape = (*projected.shape[:-1], u.shape[-1])
    lists = listed(groups, projected.shape[:-1].numel())
    if residual is None:
        y = (torch.empty if lists.covers_all else torch.zeros)(shape, dtype=dtype)
        rows = None
    else:
        y = torch.empty(shape, dtype=dtype)
        require(residual.shape == shape, f"residual is {list(residual.shape)}")
        rows = flat(residual.to(dtype))
        copy_outside(lists, rows, y.view(-1, shape[-1]))
    wide = flat(projected.to(accumulator(dtype))).contiguous()
    inputs = Inputs(flat(u).contiguous(), wide, rows)
    run(inputs, lists, prepack_adapter(adapter, dtype, prepack.instruction_set()), y)
    return y


def adapter_decompress_backward(
    dy: Tensor, u: Tensor, projected: Tensor, adapter: AdapterWeights, groups: Groups
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, wide = u.dtype, accumulator(u.dtype)
    check_decompress(u, projected, adapter, groups)
    r, d = adapter.w1u.shape
    require(dy.shape == (*projected.shape[:-1], d), f"dy is {list(dy.shape)}")
    lists = listed(groups, projected.shape[:-1].numel())
    u = flat(u).contiguous()
    du = torch.empty(u.shape, dtype=dtype)
    d_projected = (torch.empty if lists.covers_all else torch.zeros)(projected.shape, dtype=wide)
    d_w1u, d_b1 = torch.empty(r, d, dtype=wide), torch.empty(r, dtype=wide)
    d_w2, d_b2 = torch.empty(r, d, dtype=wide), torch.empty(d, dtype=wide)
    projected_rows = flat(projected.to(wide)).contiguous()
    isa, b1 = prepack.instruction_set(), as_accumulator(adapter.b1, dtype)
    w1u = pack_columns(adapter.w1u, dtype, isa, bf16=False)
    w2_rows, w1u_rows = (pack_rows(weight, dtype, isa) for weight in (adapter.w2, adapter.w1u))
    dy_rows = flat(dy.to(dtype))
    extension.load().DecompressBackward(
        isa=isa,
        dtype=dtype_code(dtype),
        threads=torch.get_num_threads(),
        groups=lists.kernel,
        d=d,
        r=r,
        phi=extension.enum_value("cpu", "adapter_activations", adapter.activation),
        u=u.data_ptr(),
        projected=projected_rows.data_ptr(),
        w1u=w1u.data_ptr(),
        b1=b1.data_ptr(),
        w2_rows=w2_rows.data_ptr(),
        w1u_rows=w1u_rows.data_ptr(),
        dy=dy_rows.data_ptr(),
        dy_stride=dy_rows.stride(0),
        du=du.data_ptr(),
        d_projected=d_projected.data_ptr(),
        d_w1u=d_w1u.data_ptr(),
        d_b1=d_b1.data_ptr(),
        d_w2=d_w2.data_ptr(),
        d_b2=d_b2.data_ptr(),
    ).run()
    return du, d_projected, d_w1u, d_b1, d_w2.t().contiguous(), d_b2
