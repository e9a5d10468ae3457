"""compressed_ffn: the whole sublayer with its plugin, norm to residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backends
from .. import checks
from ..feed_forward import FeedForward, PluginWeights, autocasts
from ..groups import Groups, Keep
from ..int8_linear import stored_here
from ..known import Known, known
from ..library import backend_module
from ..make_groups import make_groups
from ..transforms import exporting, fitting, nothing_between
from . import layered, op, reference, stored


def compressed_ffn(
    x: Tensor,
    plugin: PluginWeights,
    ffn: FeedForward | Any,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    keep: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Norm, merge, FFN on the merged vectors, decompress, residual (paper section 3.2).

    Args:
        x: ``[B, n, d]``, or varlen ``[T, d]`` together with ``cu_seqlens``.
        plugin: a :class:`PluginWeights`, or anything with a ``weights()`` that returns one.
        ffn: a :class:`FeedForward`, or anything with a ``feed_forward()`` that returns one.
        mask: ``[B, n]``, nonzero for a real token. Padding passes through unchanged, or is 0 for
            an ``ffn`` without a residual.
        cu_seqlens: int32 or int64 offsets ``[sequences + 1]`` of varlen input.
        keep_first, keep_last: how many real tokens at each end of a row (or sequence) stay whole:
            they get what the dense sublayer gives, and groups are made of those between them.
        keep: ``[B, n]``, or ``[T]`` for varlen input, nonzero for a further token that stays whole;
            padding in it is ignored. A group ends where such a token stands.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``y`` of x's shape; its dtype is x's, promoted as ``x + FFN(x)`` would be.

    Raises:
        TypeError: ``ffn`` is neither, or a number of tokens is none. ValueError: a number, shape,
        dtype, device or backend does not fit; the message names it.
    """
    plugin = plugin if isinstance(plugin, PluginWeights) else plugin.weights()
    if not isinstance(ffn, FeedForward):
        ffn = _described(ffn)
    seen = known(x, plugin, ffn)
    if seen is not None and seen.checked and (x.dim() == 3) == (cu_seqlens is None):
        checks.token_mask(mask, cu_seqlens, x)
    else:
        checks.compressed_ffn(x, plugin, ffn, mask, cu_seqlens)
        if seen is not None:
            seen.checked = True
    checks.kept(keep_first, keep_last, keep, x)
    chosen = fitting(backend, backends.resolve(backend, x))
    groups = make_groups(
        x,
        plugin.ratio,
        mask=mask,
        cu_seqlens=cu_seqlens,
        backend=chosen,
        inner=True,
        keep=Keep(keep_first, keep_last, keep),
    )
    return run(x, plugin, ffn, groups, chosen, seen)


def run(
    x: Tensor,
    plugin: PluginWeights,
    ffn: FeedForward,
    groups: Groups,
    backend: str,
    seen: Known | None = None,
) -> Tensor:
    """:func:`compressed_ffn` for arguments that were checked, on a backend that was resolved;
    ``seen`` is what is known of them, if the caller asked."""
    if backend == "reference":
        return reference.compressed_ffn(x, plugin, ffn, groups)
    if ffn.stored is not None and ffn.pack and backend == "cpu":
        runs = stored_here(x, ffn.stored.w_in)
        ffn = (stored.as_it_runs(ffn.stored, ffn.precision) if runs else None) or ffn
    on_gpu = backend in ("triton", "cuda")
    if on_gpu and seen is None:
        seen = known(x, plugin, ffn)
    if _fits_one_op(x, plugin, ffn, seen):
        # PyTorch's dispatcher takes longer than all of our own Python before a GPU's first launch.
        if on_gpu and seen is not None and seen.direct and nothing_between(groups[:5]):
            found = backend_module(__package__, backend)
            return found.compressed_ffn(x, plugin, ffn, groups, seen)
        return op.compressed_ffn(x, plugin, ffn, groups, backend)
    return layered.compressed_ffn(x, plugin, ffn, groups, backend)


def _fits_one_op(x: Tensor, plugin: PluginWeights, ffn: FeedForward, seen: Known | None) -> bool:
    """The single fused op is for inference with plain products; all else goes layer by layer."""
    if ffn.module is not None or ffn.dropout_inner > 0 or ffn.dropout_outer > 0:
        return False
    if autocasts(x):
        return False
    if not torch.is_grad_enabled() or exporting() or (seen is not None and seen.direct):
        return True
    tensors = (x, *plugin[:6], *ffn[:6], ffn.norm_weight, ffn.norm_bias)
    return not any(t is not None and t.requires_grad for t in tensors)


def _described(ffn: Any) -> FeedForward:
    if not hasattr(ffn, "feed_forward"):
        raise TypeError(
            f"ffn must be a FeedForward or have a feed_forward(), got {type(ffn).__name__} "
            "(CompressedFFN takes a model's own sublayer)"
        )
    return ffn.feed_forward()
