"""adapter_decompress on the CPU kernels (csrc/cpu/decompress.h, decompress_backward.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import extension
from ..arguments import check_decompress, flat, require
from ..cpu_arguments import (
    ACTIVATIONS,
    DTYPES,
    Groups,
    Layout,
    accumulator,
    address,
    as_accumulator,
    pack_columns,
    pack_rows,
)


def run(
    u: Tensor,
    groups: Groups,
    span: tuple[int, int],
    activation: str,
    projected: Tensor,
    w1u_packed: Tensor,
    b1: Tensor,
    w2_packed: Tensor,
    b2: Tensor,
    residual: Tensor | None,
    y: Tensor,
    poison: Tensor | None = None,
) -> None:
    """Writes the tokens of groups ``first .. first+count-1`` to flat ``y [tokens, d]``.

    ``poison [groups]`` is added to u: NaN where the merge saw NaN.
    """
    extension.load().decompress(
        DTYPES[y.dtype],
        torch.get_num_threads(),
        *groups.arguments(*span),
        y.shape[-1],
        b1.shape[0],
        ACTIVATIONS[activation],
        u.data_ptr(),
        projected.data_ptr(),
        w1u_packed.data_ptr(),
        b1.data_ptr(),
        w2_packed.data_ptr(),
        b2.data_ptr(),
        address(poison),
        address(residual),
        0 if residual is None else residual.stride(0),
        y.data_ptr(),
    )


def adapter_decompress(
    u: Tensor,
    projected: Tensor,
    w1u: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ratio: int,
    activation: str,
) -> Tensor:
    dtype = u.dtype
    layout = Layout(projected, mask, cu_seqlens)
    groups = layout.groups(ratio, compact=False)
    check_decompress(u, projected, w1u, b1, w2, groups.groups)
    require(b2.shape == u.shape[-1:], f"b2 is {list(b2.shape)}")
    shape = (*projected.shape[:-1], u.shape[-1])
    if residual is None:
        y = (torch.empty if layout.covers_all else torch.zeros)(shape, dtype=dtype)
        rows = None
    else:
        y = torch.empty(shape, dtype=dtype)
        require(residual.shape == shape, f"residual is {list(residual.shape)}")
        rows = flat(residual.to(dtype))
        layout.copy_padding(rows, y.view(-1, shape[-1]))
    run(
        flat(u).contiguous(),
        groups,
        (0, groups.groups),
        activation,
        flat(projected.to(accumulator(dtype))).contiguous(),
        pack_columns(w1u, dtype, bf16=True),
        as_accumulator(b1, dtype),
        pack_columns(w2, dtype, bf16=True),
        as_accumulator(b2, dtype),
        rows,
        y,
    )
    return y


def adapter_decompress_backward(
    dy: Tensor,
    u: Tensor,
    projected: Tensor,
    w1u: Tensor,
    b1: Tensor,
    w2: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ratio: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = u.dtype
    wide = accumulator(dtype)
    layout = Layout(projected, mask, cu_seqlens)
    groups = layout.groups(ratio, compact=False)
    r, d = w1u.shape
    check_decompress(u, projected, w1u, b1, w2, groups.groups)
    require(dy.shape == (*projected.shape[:-1], d), f"dy is {list(dy.shape)}")
    u = flat(u).contiguous()
    du = torch.empty(u.shape, dtype=dtype)
    d_projected = (torch.empty if layout.covers_all else torch.zeros)(projected.shape, dtype=wide)
    d_w1u, d_b1 = torch.empty(r, d, dtype=wide), torch.empty(r, dtype=wide)
    d_w2, d_b2 = torch.empty(r, d, dtype=wide), torch.empty(d, dtype=wide)
    projected_rows = flat(projected.to(wide)).contiguous()
    w1u_packed, wide_b1 = pack_columns(w1u, dtype, bf16=False), as_accumulator(b1, dtype)
    w2_rows, w1u_rows = pack_rows(w2, dtype), pack_rows(w1u, dtype)
    dy_rows = flat(dy.to(dtype))
    extension.load().decompress_backward(
        DTYPES[dtype],
        torch.get_num_threads(),
        *groups.arguments(),
        d,
        r,
        ACTIVATIONS[activation],
        u.data_ptr(),
        projected_rows.data_ptr(),
        w1u_packed.data_ptr(),
        wide_b1.data_ptr(),
        w2_rows.data_ptr(),
        w1u_rows.data_ptr(),
        dy_rows.data_ptr(),
        dy_rows.stride(0),
        du.data_ptr(),
        d_projected.data_ptr(),
        d_w1u.data_ptr(),
        d_b1.data_ptr(),
        d_w2.data_ptr(),
        d_b2.data_ptr(),
    )
    return du, d_projected, d_w1u, d_b1, d_w2.t().contiguous(), d_b2
