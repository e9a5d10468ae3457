"""adapter_decompress on the Triton kernels (triton_kernels/decompress.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_kernels import launch
from ...triton_kernels.decompress import adapter_decompress_kernel
from ...triton_kernels.decompress_backward import group_gradient_kernel, inner_gradient_kernel
from ..arguments import AdapterWeights, check_decompress, flat, require
from ..gpu_arguments import (
    DecompressInputs,
    GpuGroups,
    decompress_output,
    flat_or_none,
    gpu_groups,
    unit_rows,
)
from ..groups import Groups
from ..triton_weight_gradient import weight_sums


def groups_a_tile(slots: int, k: int) -> int:
    """The groups that a tile of consecutive slots can touch, as rows of a matrix product."""
    return launch.power_of_2(slots // k if slots % k == 0 else slots // k + 2, 16)


def blocks_a_program(tiles: int, blocks: int, processors: int) -> int:
    """All blocks of columns where every multiprocessor has a tile; of fewer tiles the columns are
    shared out, and each program makes its tile's t."""
    return launch.cdiv(blocks, max(1, min(blocks, processors // tiles)))


def unit_strides(adapter: AdapterWeights) -> AdapterWeights:
    """The same as the kernels read it."""
    w1u, b1, w2, b2, activation = adapter
    return AdapterWeights(
        unit_rows(w1u), b1.contiguous(), unit_rows(w2), b2.contiguous(), activation
    )


def launches(
    inputs: DecompressInputs, groups: GpuGroups, adapter: AdapterWeights, y: Tensor
) -> launch.Launch | None:
    """Of the form of :func:`unit_strides`' weights; None where there is no group."""
    if groups.launched == 0:
        return None
    residual, w1u, w2 = inputs.residual, adapter.w1u, adapter.w2
    k, d, r = groups.ratio, y.shape[-1], adapter.b1.shape[0]
    case = launch.case(y, d, k, launch.tiles(y.shape[0]), r=launch.bottleneck(r))
    row = launch.settings("adapter_decompress", **case)
    tiles = launch.cdiv(groups.launched * k, row["bt"])
    blocks = launch.cdiv(d, row["bd"])
    across = blocks_a_program(tiles, blocks, launch.processors(y))
    residual_stride = 0 if residual is None else residual.stride(0)
    return launch.Launch(
        adapter_decompress_kernel,
        (tiles, launch.cdiv(blocks, across)),
        (*groups.sizes, across, d, w1u.stride(0), w2.stride(0), residual_stride),
        dict(
            K=k, BT=row["bt"], BU=groups_a_tile(row["bt"], k), BD=row["bd"], R=r,
            BR=min(row["br"], launch.bottleneck(r)), TANH=adapter.activation == "tanh",
            FORM=groups.form, PRECISION=launch.precision(y), STAGES=row["stages"],
            **launch.options(row),
        ),
    )  # fmt: skip


def start(
    found: launch.Launch,
    inputs: DecompressInputs,
    groups: GpuGroups,
    adapter: AdapterWeights,
    y: Tensor,
) -> None:
    """Writes every row of flat ``y [tokens, d]``; ``found`` is of :func:`launches`."""
    u, projected, residual, poison = inputs
    w1u, b1, w2, b2, _ = adapter
    found(
        u, projected, w1u, b1, w2, b2, residual, poison, groups.kept, *groups.pointers, y
    )  # fmt: skip


def run(inputs: DecompressInputs, groups: GpuGroups, adapter: AdapterWeights, y: Tensor) -> None:
    """Writes every row of flat ``y [tokens, d]``."""
    adapter = unit_strides(adapter)
    found = launches(inputs, groups, adapter, y)
    if found is not None:
        start(found, inputs, groups, adapter, y)


def adapter_decompress(
    u: Tensor,
    projected: Tensor,
    adapter: AdapterWeights,
    residual: Tensor | None,
    groups: Groups,
) -> Tensor:
    launched, y = decompress_output(u, projected, adapter, residual, groups)
    with launch.device_of(u):
        rows = flat(projected.to(torch.float32)).contiguous()
        inputs = DecompressInputs(flat(u).contiguous(), rows, flat_or_none(residual))
        run(inputs, launched, adapter, flat(y))
    return y


def adapter_decompress_backward(
    dy: Tensor, u: Tensor, projected: Tensor, adapter: AdapterWeights, groups: Groups
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = u.dtype
    r, d = adapter.w1u.shape
    check_decompress(u, projected, adapter, groups)
    launched = gpu_groups(groups, projected)
    require(dy.shape == (*projected.shape[:-1], d), f"dy is {list(dy.shape)}")
    u = flat(u).contiguous()
    du = torch.empty_like(u)
    d_projected = projected.new_empty(projected.shape, dtype=torch.float32)
    if launched.launched == 0:
        wide = u.new_zeros(2 * r * d + r + d, dtype=torch.float32)
        d_w1u, d_b1, d_w2, d_b2 = wide.split([r * d, r, r * d, d])
        return du, d_projected, d_w1u.view(r, d), d_b1, d_w2.view(d, r), d_b2
    with launch.device_of(u):
        dy, adapter = flat(dy.to(dtype)), adapter._replace(w1u=unit_rows(adapter.w1u))
        t = u.new_empty(dy.shape[0], r)
        rows = flat(projected.to(torch.float32)).contiguous()
        inputs = DecompressInputs(u, rows)
        adapted = launched.adapted()
        _inner_gradient(dy, inputs, adapted, adapter, t, d_projected)
        d_group = _group_gradient(dy, launched, d_projected, adapter.w1u, du)
        sums = weight_sums(dy, adapted, t, columns=True)
    d_w1u = (d_group.to(dtype).t() @ u).to(torch.float32)
    return du, d_projected, d_w1u, d_group.sum(0), sums.b.t().contiguous(), sums.a


def _inner_gradient(
    dy: Tensor,
    inputs: DecompressInputs,
    groups: GpuGroups,
    adapter: AdapterWeights,
    t: Tensor,
    d_projected: Tensor,
) -> None:
    """Writes t and the gradient of ``projected``, a row a token."""
    u = inputs.u
    k, d, r = groups.ratio, u.shape[1], t.shape[1]
    case = launch.case(u, d, k, launch.tiles(dy.shape[0]), r=launch.bottleneck(r))
    row = launch.settings("inner_gradient", **case)
    br = min(row["br"], launch.bottleneck(r))
    w1u, b1, w2 = adapter.w1u, adapter.b1, unit_rows(adapter.w2)
    grid = (launch.cdiv(groups.launched * k, row["bt"]), launch.cdiv(r, br))
    inner_gradient_kernel[grid](
        dy, u, inputs.projected, w1u, b1.contiguous(), w2,
        *groups.pointers, t, d_projected,
        *groups.sizes, d,
        dy.stride(0), w1u.stride(0), w2.stride(0),
        K=k, BT=row["bt"], BU=groups_a_tile(row["bt"], k), BD=row["bd"], R=r,
        BR=br, TANH=adapter.activation == "tanh", FORM=groups.form,
        PRECISION=launch.precision(u), **launch.options(row),
    )  # fmt: skip


def _group_gradient(
    dy: Tensor, groups: GpuGroups, d_projected: Tensor, w1u: Tensor, du: Tensor
) -> Tensor:
    """Writes du; returns ``Σ_j dz_j [groups, r]``."""
    k, (r, d) = groups.ratio, w1u.shape
    case = launch.case(du, d, k, launch.tiles(dy.shape[0]), r=launch.bottleneck(r))
    row = launch.settings("group_gradient", **case)
    d_group = du.new_empty(groups.total, r, dtype=torch.float32)
    group_gradient_kernel[(launch.cdiv(groups.total, row["bg"]), launch.cdiv(d, row["bd"]))](
        dy, d_projected, w1u, *groups.pointers, du, d_group,
        *groups.sizes, d, dy.stride(0), w1u.stride(0),
        K=k, BG=row["bg"], BD=row["bd"], R=r, BR=min(row["br"], launch.bottleneck(r)),
        FORM=groups.form, PRECISION=launch.precision(du), **launch.options(row),
    )  # fmt: skip
    return d_group
