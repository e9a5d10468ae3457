"""adapter_decompress on the Triton kernels (triton_kernels/decompress.py)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...triton_kernels import launch
from ...triton_kernels.decompress import adapter_decompress_kernel
from ..arguments import check_decompress, flat, require
from ..gpu_arguments import Groups, groups, rows_of


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
    row = launch.settings("adapter_decompress", arch=launch.arch(y), d=d, k=k, dtype=launch.name(y.dtype))
    w1u, w2 = rows_of(w1u), rows_of(w2)
    adapter_decompress_kernel[(triton.cdiv(spans.launched * k, row["bt"]),)](
        u, projected, w1u, b1.contiguous(), w2, b2.contiguous(), residual, poison,
        spans.start, spans.length, spans.span, spans.mask, y,
        spans.count, spans.launched, spans.n, spans.per_row, d,
        w1u.stride(0), w2.stride(0), 0 if residual is None else residual.stride(0),
        K=k, BT=row["bt"], BU=groups_a_tile(row["bt"], k), BD=row["bd"], R=r,
        R2=launch.power_of_2(r, 16), TANH=activation == "tanh", FORM=spans.form,
        PRECISION=launch.precision(y.dtype), **launch.options(row),
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
    spans = groups(projected, mask, cu_seqlens, ratio)
    check_decompress(u, projected, w1u, b1, w2, spans.count)
    require(b2.shape == u.shape[-1:], f"b2 is {list(b2.shape)}")
    shape = (*projected.shape[:-1], u.shape[-1])
    require(residual is None or residual.shape == shape, "residual's shape")
    y = u.new_empty(shape)
    with launch.device_of(u):
        run(
            flat(u).contiguous(), spans, activation,
            flat(projected.to(torch.float32)).contiguous(), w1u, b1, w2, b2,
            None if residual is None else flat(residual), flat(y),
        )  # fmt: skip
    return y
