"""compressed_ffn as three differentiable steps: merge, the FFN in PyTorch, decompress.

For training, dropout, autocast and FFNs that are more than their weights. Saved for the backward
pass: x, the softmax weights (k numbers a group), W_1h h (r a token), and what the FFN itself saves
for the merged vectors. h, t and everything else of n rows is computed again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import prepacked_linear
from ..adapter_decompress import op as decompress
from ..arguments import Norm
from ..fast_norm import normalize_fast
from ..feed_forward import FeedForward, PluginWeights, products
from ..group_merge import op as merge
from ..groups import Groups, real_tokens
from ..int8_linear import op as int8_linear
from ..transforms import tracing


def compressed_ffn(
    x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups, backend: str
) -> Tensor:
    merged, projected, _ = merge.group_merge(x, plugin.merge, groups, ffn.pre_norm, backend)
    u = products(merged, ffn, _linear(ffn))
    dtype = torch.promote_types(x.dtype, u.dtype)
    residual = x.to(dtype) if ffn.residual else None
    y = decompress.adapter_decompress(
        u.to(dtype), projected, plugin.adapter, residual, groups, backend
    )
    return normalize_real(y, ffn.any_norm, groups) if ffn.post_norm else y


def _linear(ffn: FeedForward) -> Callable[..., Tensor]:
    if ffn.precision == "int8":
        return int8_linear.linear
    return prepacked_linear.linear if ffn.pack else prepacked_linear.unpacked


def normalize_real(y: Tensor, norm: Norm, groups: Groups) -> Tensor:
    """The norm after the residual, for real tokens alone, in y's dtype."""
    real = real_tokens(groups, y)
    if real is None:
        return normalize_fast(y, norm).to(y.dtype)
    tokens = y
    # What padding holds must not reach the norm's gradient. A trace must not depend on whether one
    # is taken.
    if torch.is_grad_enabled() or tracing():
        tokens = torch.where(real[..., None], y, 0)
    return torch.where(real[..., None], normalize_fast(tokens, norm).to(y.dtype), y)
