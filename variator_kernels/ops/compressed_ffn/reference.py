"""compressed_ffn in plain PyTorch: the definition of correct, section 2 line by line."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapter_decompress.reference import adapter_decompress
from ..feed_forward import FeedForward, PluginWeights, normalize, products
from ..group_merge.reference import group_merge
from ..groups import Groups, real_tokens


def compressed_ffn(x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups) -> Tensor:
    """The whole sublayer, norm to residual: ``x [B, n, d]``, or varlen ``[T, d]``."""
    norm = (ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)
    real = real_tokens(groups, x)
    real = None if real is None else real[..., None]
    # What padding holds must not reach the norm's gradient.
    tokens = x if real is None else torch.where(real, x, 0)
    h = tokens if ffn.post_norm else normalize(tokens, *norm)
    g = group_merge(h, plugin.merge_weight, plugin.merge_bias, groups)
    u = products(g, ffn)
    h = h.to(torch.promote_types(h.dtype, u.dtype))
    w1, b1, w2, b2 = plugin[2:6]
    o = adapter_decompress(u, h, w1, b1, w2, b2, groups, plugin.activation)
    y = (x + o if ffn.residual else o).to(torch.promote_types(x.dtype, u.dtype))
    if ffn.post_norm:
        kept = y if real is None else torch.where(real, y, 0)
        normed = normalize(kept, *norm).to(y.dtype)
        y = normed if real is None else torch.where(real, normed, y)
    return y
