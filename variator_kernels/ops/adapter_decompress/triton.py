"""adapter_decompress on the Triton kernels (triton_kernels/decompress.py)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...triton_kernels import launch
from ...triton_kernels.decompress import adapter_decompress_kernel
from ...triton_kernels.decompress_backward import group_gradient_kernel, inner_gradient_kernel
from ..arguments import check_decompress, flat, require
from ..gpu_arguments import Groups, decompress_output, groups, rows_of
from ..triton_sums import weight_sums


def groups_a_tile(slots: int, k: int) -> int:
    """The groups that a tile of consecutive slots can touch, as rows of a matrix product."""
    return launch.power_of_2(slots // k if slots % k == 0 else slots // k + 2, 16)


def run(
    u: Tensor,
    spans: Groups,
    activation: str,
    projected: Tensor,
    w1u: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    residual: Tensor | None,
    y: Tensor,
    poison: Tensor | None = None,
) -> None:
    """Writes every row of flat ``y [tokens, d]``.

    ``poison [groups, k]``, the merge's softmax weights, carries NaN past the FFN's activation.
    """
    if spans.launched == 0:
        return
    k, d, r = spans.ratio, y.shape[-1], b1.shape[0]
    row = launch.settings(
        "adapter_decompress", arch=launch.arch(y), d=d, k=k, dtype=launch.name(y.dtype)
    )
    w1u, w2 = rows_of(w1u), rows_of(w2)
    adapter_decompress_kernel[(triton.cdiv(spans.launched * k, row["bt"]),)](
        u, projected, w1u, b1.contiguous(), w2, b2.contiguous(), residual, poison,
        spans.start, spans.length, spans.span, spans.mask, y,
        spans.total, spans.launched, spans.n, spans.per_row, d,
        w1u.stride(0), w2.stride(0), 0 if residual is None else residual.stride(0),
        K=k, BT=row["bt"], BU=groups_a_tile(row["bt"], k), BD=row["bd"], R=r,
        R2=launch.power_of_2(r, 16), TANH=activation == "tanh", FORM=spans.form,
        PRECISION=launch.precision(y), STAGES=row["stages"], **launch.options(row),
    )  # fmt: skip


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
    spans, y = decompress_output(u, projected, w1u, b1, w2, b2, residual, mask, cu_seqlens, ratio)
    with launch.device_of(u):
        run(
            flat(u).contiguous(), spans, activation,
            flat(projected.to(torch.float32)).contiguous(), w1u, b1, w2, b2,
            None if residual is None else flat(residual), flat(y),
        )  # fmt: skip
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
    dtype, k = u.dtype, ratio
    r, d = w1u.shape
    spans = groups(projected, mask, cu_seqlens, k)
    check_decompress(u, projected, w1u, b1, w2, spans.total)
    require(dy.shape == (*projected.shape[:-1], d), f"dy is {list(dy.shape)}")
    u = flat(u).contiguous()
    du = torch.empty_like(u)
    d_projected = projected.new_empty(projected.shape, dtype=torch.float32)
    if spans.launched == 0:
        wide = u.new_zeros(2 * r * d + r + d, dtype=torch.float32)
        d_w1u, d_b1, d_w2, d_b2 = wide.split([r * d, r, r * d, d])
        return du, d_projected, d_w1u.view(r, d), d_b1, d_w2.view(d, r), d_b2
    with launch.device_of(u):
        dy, w1u = flat(dy.to(dtype)), rows_of(w1u)
        t = u.new_empty(dy.shape[0], r)
        _inner_gradient(dy, u, spans, activation, projected, w1u, b1, w2, t, d_projected)
        d_group = _group_gradient(dy, spans, d_projected, w1u, du)
        sums = weight_sums(dy, spans, t, columns=True)
    d_w1u = (d_group.to(dtype).t() @ u).to(torch.float32)
    return du, d_projected, d_w1u, d_group.sum(0), sums.b.t().contiguous(), sums.a


def _inner_gradient(
    dy: Tensor,
    u: Tensor,
    spans: Groups,
    activation: str,
    projected: Tensor,
    w1u: Tensor,
    b1: Tensor,
    w2: Tensor,
    t: Tensor,
    d_projected: Tensor,
) -> None:
    """Writes t and the gradient of ``projected``, a row a token."""
    k, d, r = spans.ratio, u.shape[1], t.shape[1]
    case = {"arch": launch.arch(u), "d": d, "k": k, "dtype": launch.name(u.dtype)}
    row = launch.settings("inner_gradient", **case)
    w2 = rows_of(w2)
    inner_gradient_kernel[(triton.cdiv(spans.launched * k, row["bt"]),)](
        dy, u, flat(projected.to(torch.float32)).contiguous(), w1u, b1.contiguous(), w2,
        spans.start, spans.length, spans.span, spans.mask, t, d_projected,
        spans.total, spans.launched, spans.n, spans.per_row, d,
        dy.stride(0), w1u.stride(0), w2.stride(0),
        K=k, BT=row["bt"], BU=groups_a_tile(row["bt"], k), BD=row["bd"], R=r,
        R2=launch.power_of_2(r, 16), TANH=activation == "tanh", FORM=spans.form,
        PRECISION=launch.precision(u), **launch.options(row),
    )  # fmt: skip


def _group_gradient(
    dy: Tensor, spans: Groups, d_projected: Tensor, w1u: Tensor, du: Tensor
) -> Tensor:
    """Writes du; returns ``Σ_j dz_j [groups, r]``."""
    k, (r, d) = spans.ratio, w1u.shape
    case = {"arch": launch.arch(du), "d": d, "k": k, "dtype": launch.name(du.dtype)}
    row = launch.settings("group_gradient", **case)
    d_group = du.new_empty(spans.total, r, dtype=torch.float32)
    group_gradient_kernel[(triton.cdiv(spans.total, row["bg"]), triton.cdiv(d, row["bd"]))](
        dy, d_projected, w1u, spans.start, spans.length, spans.span, spans.mask, du, d_group,
        spans.total, spans.launched, spans.n, spans.per_row, d, dy.stride(0), w1u.stride(0),
        K=k, BG=row["bg"], BD=row["bd"], R=r, R2=launch.power_of_2(r, 16), FORM=spans.form,
        PRECISION=launch.precision(du), **launch.options(row),
    )  # fmt: skip
    return d_group
