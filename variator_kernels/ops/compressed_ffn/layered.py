"""compressed_ffn as three differentiable steps: merge, the FFN in PyTorch, decompress.

For training, dropout, autocast and FFNs that are more than their weights. Saved for the backward
pass: x, the softmax weights (k numbers a group), W_1h h (r a token), and what the FFN itself saves
for the merged vectors. h, t and everything else of n rows is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapter_decompress import op as decompress
from ..feed_forward import FeedForward, PluginWeights, normalize, products
from ..group_merge import op as merge
from ..groups import token_slots


def compressed_ffn(
    x: Tensor,
    plugin: PluginWeights,
    ffn: FeedForward,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Tensor:
    w1u, w1h = plugin.w1.chunk(2, -1)
    pre_norm = not ffn.post_norm and ffn.norm != "none"
    merged, projected, _ = merge.group_merge(
        x,
        plugin.merge_weight,
        plugin.merge_bias,
        mask,
        cu_seqlens,
        norm=ffn.norm if pre_norm else "none",
        norm_weight=ffn.norm_weight if pre_norm else None,
        norm_bias=ffn.norm_bias if pre_norm else None,
        eps=ffn.eps,
        projection=w1h,
        backend=backend,
    )
    u = products(merged, ffn)
    out_dtype = torch.promote_types(x.dtype, u.dtype)
    y = decompress.adapter_decompress(
        u.to(out_dtype),
        projected,
        w1u,
        plugin.b1,
        plugin.w2,
        plugin.b2,
        x.to(out_dtype) if ffn.residual else None,
        mask,
        cu_seqlens,
        plugin.ratio,
        plugin.activation,
        backend,
    )
    if not ffn.post_norm:
        return y
    return normalize_real(y, ffn, plugin.ratio, mask, cu_seqlens)


def normalize_real(
    y: Tensor, ffn: FeedForward, ratio: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The norm after the residual, for real tokens alone, in y's dtype."""
    norm = (ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)
    if mask is None and cu_seqlens is None:
        return normalize(y, *norm).to(y.dtype)
    _, real = token_slots(y, ratio, mask, cu_seqlens)
    # What padding holds must not reach the norm's gradient.
    normed = normalize(torch.where(real[..., None], y, 0), *norm)
    return torch.where(real[..., None], normed.to(y.dtype), y)
