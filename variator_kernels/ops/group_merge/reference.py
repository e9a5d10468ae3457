"""group_merge in plain PyTorch: what correct means (paper section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..groups import Groups, slots


def gather(h: Tensor, index: Tensor, exists: Tensor) -> Tensor:
    """``h``'s vectors by slot, zeros where a slot holds no token: ``[..., G, k, d]``."""
    rows = h.reshape(-1, h.shape[-1])
    if index.dim() == 2 and rows.shape[0] == 0:  # varlen: groups, but no token
        return h.new_zeros(*index.shape, h.shape[-1])
    return torch.where(exists[..., None], rows[index], rows.new_zeros(()))


def merge_softmax(hs: Tensor, exists: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``a = softmax(W_c · concat(h) + b_c)`` over the slots that hold a token, at least fp32."""
    scores = torch.nn.functional.linear(hs.flatten(-2), weight.to(hs.dtype), bias.to(hs.dtype))
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores.masked_fill(~exists, float("-inf"))
    empty = ~exists.any(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1) * exists


def group_merge(h: Tensor, weight: Tensor, bias: Tensor, groups: Groups) -> Tensor:
    """``g_i = Σ_j a_ij h_ij``: ``[B, n, d]`` to ``[B, ceil(n/k), d]``, ``[T, d]`` to ``[G, d]``.

    The one token of a kept group has weight 1, so it is itself.
    """
    index, exists = slots(groups)
    hs = gather(h, index, exists)
    a = merge_softmax(hs, exists, weight, bias)
    return (a[..., None, :].to(hs.dtype) @ hs).squeeze(-2)
