"""compressed_ffn in plain PyTorch: the definition of correct, section 2 line by line."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapter_decompress.reference import adapter_decompress
from ..feed_forward import FeedForward, PluginWeights, normalize, products
from ..group_merge.reference import group_merge
from ..groups import token_slots


def compressed_ffn(
    x: Tensor,
    plugin: PluginWeights,
    ffn: FeedForward,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The whole sublayer, norm to residual: ``x [B, n, d]``, or packed ``[T, d]``."""
    norm = (ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)
    real = None
    if mask is not None or cu_seqlens is not None:
        real = token_slots(x, plugin.ratio, mask, cu_seqlens)[1][..., None]
    # What padding holds must not reach the norm's gradient.
    tokens = x if real is None else torch.where(real, x, 0)
    h = tokens if ffn.post_norm else normalize(tokens, *norm)
    g = group_merge(h, plugin.merge_weight, plugin.merge_bias, mask=mask, cu_seqlens=cu_seqlens)
    u = products(g, ffn)
    o = adapter_decompress(
        u,
        h.to(torch.promote_types(h.dtype, u.dtype)),
        plugin.w1,
        plugin.b1,
        plugin.w2,
        plugin.b2,
        ratio=plugin.ratio,
        mask=mask,
        cu_seqlens=cu_seqlens,
        activation=plugin.activation,
    )
    y = (x + o if ffn.residual else o).to(torch.promote_types(x.dtype, u.dtype))
    if ffn.post_norm:
        kept = y if real is None else torch.where(real, y, 0)
        normed = normalize(kept, *norm).to(y.dtype)
        y = normed if real is None else torch.where(real, normed, y)
    return y
