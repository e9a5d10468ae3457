"""group_merge: k neighbouring hidden vectors into one, by a learned softmax average."""

from __future__ import annotations

from torch import Tensor

from ... import backends
from .. import checks
from ..arguments import NO_NORM, MergeWeights
from ..make_groups import make_groups
from ..transforms import fitting
from . import op, reference


def group_merge(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Merge groups of k = ``len(bias)`` vectors: ``g_i = Σ_j softmax(W_c·concat(h)+b_c)_j h_ij``.

    Args:
        x: ``[B, n, d]``, or varlen ``[T, d]`` together with ``cu_seqlens``.
        weight, bias: W_c ``[k, k*d]`` and b_c ``[k]`` (paper section 3.2).
        mask: ``[B, n]``, nonzero for a real token; groups start at a row's first real token.
        cu_seqlens: int32 or int64 offsets ``[sequences + 1]`` of varlen input.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``[B, ceil(n/k), d]`` in x's dtype, or ``[(T + sequences*(k-1)) // k, d]`` for varlen
        input; groups without a token are 0, and those of varlen input come last.

    Raises:
        ValueError: a shape, dtype, device or backend does not fit; the message names it.
    """
    checks.hidden(x, cu_seqlens)
    checks.token_mask(mask, cu_seqlens, x)
    checks.merge_parameters(weight, bias, x)
    chosen = fitting(backend, backends.resolve(backend, x))
    groups = make_groups(x, len(bias), mask=mask, cu_seqlens=cu_seqlens, backend=chosen)
    if chosen == "reference":
        return reference.group_merge(x, weight, bias, groups)
    return op.group_merge(x, MergeWeights(weight, bias), groups, NO_NORM, chosen)[0]
