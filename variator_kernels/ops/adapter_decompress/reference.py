"""adapter_decompress in plain PyTorch: what correct means (paper section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..group_merge.reference import gather
from ..groups import slots, token_slots


def adapter_decompress(
    u: Tensor,
    h: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    ratio: int,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str = "tanh",
) -> Tensor:
    """``o_ij = u_i + W_2 φ(W_1 · concat(u_i, h_ij) + b_1) + b_2``; 0 where there is no token.

    ``u [B, ceil(n/k), d]`` and ``h [B, n, d]`` give ``[B, n, d]``; packed ``u [G, d]`` and
    ``h [T, d]`` give ``[T, d]``.
    """
    index, exists = slots(h, ratio, mask, cu_seqlens)
    dtype = h.dtype
    us = u.to(dtype)[..., None, :].expand(*index.shape, u.shape[-1])
    t = F.linear(torch.cat([us, gather(h, index, exists)], -1), w1.to(dtype), b1.to(dtype))
    t = torch.tanh(t) if activation == "tanh" else t
    o = us + F.linear(t, w2.to(dtype), b2.to(dtype))
    slot, real = token_slots(h, ratio, mask, cu_seqlens)
    if slot.numel() == 0:
        return torch.zeros_like(h)
    return torch.where(real[..., None], o.reshape(-1, o.shape[-1])[slot], o.new_zeros(()))
