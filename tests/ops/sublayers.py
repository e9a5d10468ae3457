"""What tests of sublayers in one call share: inputs of every kind."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops import cases
from variator_kernels.ops.groups import Groups, Keep
from variator_kernels.ops.make_groups import make_groups

D = 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRECISIONS = [None, "int8"]


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(7), other.nan_to_num(7)
    )


def inputs(dtype: torch.dtype, kind: str, ratio: int) -> tuple[Tensor, Groups]:
    """Of a shape, mask or kept tokens."""
    x = torch.randn(3, 37, D).to(dtype)
    mask, keep, lengths = None, Keep(), None
    if kind in cases.MASKS:
        mask = cases.masked(kind, 3, 37)
    elif kind == "kept":
        keep = Keep(2, 1, torch.rand(3, 37) < 0.1)
    elif kind == "strided":
        x = torch.randn(3, 37, 2 * D).to(dtype)[..., :D]
    elif kind == "NaN":
        x[1, 5, 3], x[2, 36, 0] = torch.nan, torch.inf
    elif kind == "varlen":
        x, lengths = x.view(-1, D), torch.tensor([0, 5, 5, 60, 100])
    elif kind == "many":  # more than pass the products at once
        x = torch.randn(2, 2300 * ratio + 3, D).to(dtype)
    elif kind == "nothing":
        mask = torch.zeros(3, 37, dtype=torch.bool)
    return x, make_groups(
        x, ratio, mask=mask, cu_seqlens=lengths, backend="cpu", inner=True, keep=keep
    )
