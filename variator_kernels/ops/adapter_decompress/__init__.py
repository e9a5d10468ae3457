"""adapter_decompress: one vector back into k token-level vectors, by a small adapter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import backends
from ...checks import ratio as check_ratio
from .. import checks
from ..arguments import AdapterWeights
from ..groups import max_groups, real_tokens
from ..make_groups import make_groups
from ..transforms import fitting
from . import op, reference


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
    backend: str = "auto",
) -> Tensor:
    """Restore token vectors: ``o_ij = u_i + W_2 φ(W_1·concat(u_i, h_ij) + b_1) + b_2``.

    Args:
        u: ``[B, ceil(n/k), d]``, or varlen ``[(T + sequences*(k-1)) // k, d]``.
        h: ``[B, n, d]`` or varlen ``[T, d]``, what the merge saw.
        w1, b1, w2, b2: ``[r, 2d]`` (u's half first), ``[r]``, ``[d, r]``, ``[d]``.
        ratio: k, at least 2.
        mask, cu_seqlens, backend: as in :func:`group_merge`.
        activation: φ, ``"tanh"`` or ``"identity"``.

    Returns:
        ``o`` of h's shape and dtype; 0 where there is no token.

    Raises:
        ValueError: a shape, dtype, device or backend does not fit; the message names it.
    """
    check_ratio(ratio, least=2)
    checks.hidden(h, cu_seqlens, "h")
    checks.token_mask(mask, cu_seqlens, h)
    checks.adapter_parameters(w1, b1, w2, b2, activation, h)
    most = max_groups(h, ratio, cu_seqlens)
    checks.shape(u, (*h.shape[:-2], most, h.shape[-1]), "u")
    checks.same_device(u, h, "u", "h")
    chosen = fitting(backend, backends.resolve(backend, h))
    groups = make_groups(h, ratio, mask=mask, cu_seqlens=cu_seqlens, backend=chosen)
    if chosen == "reference":
        return reference.adapter_decompress(u, h, w1, b1, w2, b2, groups, activation)
    real = real_tokens(groups, h)
    if real is not None:
        # What padding holds must not reach W_1's gradient.
        h = torch.where(real[..., None], h, 0)
    w1u, w1h = w1.chunk(2, -1)
    projected = F.linear(h, w1h.to(h.dtype))
    adapter = AdapterWeights(w1u, b1, w2, b2, activation)
    return op.adapter_decompress(u.to(h.dtype), projected, adapter, None, groups, chosen)
