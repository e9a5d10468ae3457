"""adapter_decompress in plain PyTorch: what correct means (paper section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..groups import Groups, count_tokens, slots, token_slots


def _gather(h: Tensor, index: Tensor, exists: Tensor) -> Tensor:
    rows = h.reshape(-1, h.shape[-1])
    return torch.where(exists[..., None], rows[index], rows.new_zeros(()))


def adapter_decompress(
    u: Tensor,
    h: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    groups: Groups,
    activation: str,
) -> Tensor:
    """``o_ij = u_i + W_2 φ(W_1 · concat(u_i, h_ij) + b_1) + b_2``; 0 where there is no token.

    ``u [B, ceil(n/k), d]`` and ``h [B, n, d]`` give ``[B, n, d]``; varlen ``u [G, d]`` and
    ``h [T, d]`` give ``[T, d]``. In a kept group ``o`` is ``u``.
    """
    dtype, tokens = h.dtype, count_tokens(h)
    index, exists = slots(groups)
    if h.dim() == 2 and (tokens == 0 or index.numel() == 0):  # varlen: no group, or no token
        return torch.zeros_like(h)
    us = u.to(dtype)[..., None, :].expand(*index.shape, u.shape[-1])
    # One list of slots: exporters would specialise on how a product splits it up again.
    both = torch.cat([us, _gather(h, index, exists)], -1).flatten(0, -2)
    us = us.flatten(0, -2)
    t = F.linear(both, w1.to(dtype), b1.to(dtype))
    t = torch.tanh(t) if activation == "tanh" else t
    o = us + F.linear(t, w2.to(dtype), b2.to(dtype))
    if groups.kept is not None:
        kept = groups.kept[..., None].expand(index.shape).flatten()
        o = torch.where(kept[:, None], us, o)
    slot, real = token_slots(groups, tokens)
    out = torch.where(real[:, None], o[slot], o.new_zeros(()))
    return out.view(h.shape)
