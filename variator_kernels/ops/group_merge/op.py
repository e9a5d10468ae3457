"""group_merge as a registered op: schema, fake, autograd. Backends are modules of functions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..groups import max_groups
from ..library import LIBRARY, backend_module, define, refuse_second_derivatives

define(
    "group_merge(Tensor x, Tensor weight, Tensor bias, Tensor? mask, Tensor? cu_seqlens, str norm,"
    " Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? projection, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
define(
    "group_merge_backward(Tensor d_merged, Tensor d_projected, Tensor x, Tensor weights,"
    " Tensor weight, Tensor? mask, Tensor? cu_seqlens, str norm, Tensor? norm_weight,"
    " Tensor? norm_bias, float eps, Tensor? projection, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def group_merge(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    projection: Tensor | None = None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges ``h = norm(x)`` and, on the way, projects it.

    Returns ``merged`` (as :func:`variator_kernels.functional.group_merge`), ``projected``
    ``[..., n, r]`` = ``projection · h`` (accumulator dtype; r = 0 without ``projection [r, d]``;
    0 where there is no token) and the softmax ``weights`` ``[..., G, k]``.
    """
    return torch.ops.variator.group_merge(
        x, weight, bias, mask, cu_seqlens, norm, norm_weight, norm_bias, eps, projection, backend
    )


@torch.library.impl(LIBRARY, "group_merge", "CompositeExplicitAutograd")
def _forward(x, weight, bias, mask, cu, norm, norm_weight, norm_bias, eps, projection, backend):
    module = backend_module(__package__, backend)
    return module.group_merge(
        x, weight, bias, mask, cu, norm, norm_weight, norm_bias, eps, projection
    )


@torch.library.impl(LIBRARY, "group_merge_backward", "CompositeExplicitAutograd")
def _backward(
    d_merged,
    d_projected,
    x,
    weights,
    weight,
    mask,
    cu,
    norm,
    norm_weight,
    norm_bias,
    eps,
    projection,
    backend,
):
    module = backend_module(__package__, backend)
    return module.group_merge_backward(
        d_merged,
        d_projected,
        x,
        weights,
        weight,
        mask,
        cu,
        norm,
        norm_weight,
        norm_bias,
        eps,
        projection,
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("variator::group_merge")
def _fake(x, weight, bias, mask, cu, norm, norm_weight, norm_bias, eps, projection, backend):
    k, d = bias.shape[0], x.shape[-1]
    lead = x.shape[:-2] if cu is None else ()
    groups = max_groups(x, k, cu)
    r = 0 if projection is None else projection.shape[0]
    return (
        x.new_empty(*lead, groups, d),
        x.new_empty(*x.shape[:-1], r, dtype=_wide(x)),
        x.new_empty(*lead, groups, k, dtype=_wide(x)),
    )


@torch.library.register_fake("variator::group_merge_backward")
def _fake_backward(
    d_merged,
    d_projected,
    x,
    weights,
    weight,
    mask,
    cu,
    norm,
    norm_weight,
    norm_bias,
    eps,
    projection,
    backend,
):
    k, d = weights.shape[-1], x.shape[-1]
    r = 0 if projection is None else projection.shape[0]
    wide = _wide(x)
    return (
        x.new_empty(x.shape),
        x.new_empty(k, k * d, dtype=wide),
        x.new_empty(k, dtype=wide),
        x.new_empty(r, d, dtype=wide),
        x.new_empty(0 if norm_weight is None else d, dtype=wide),
        x.new_empty(0 if norm_bias is None else d, dtype=wide),
    )


def _setup(ctx, inputs, output):
    x, weight, bias, mask, cu, norm, norm_weight, norm_bias, eps, projection, backend = inputs
    ctx.save_for_backward(x, weight, bias, mask, cu, norm_weight, norm_bias, projection, output[2])
    ctx.norm, ctx.eps, ctx.backend = norm, eps, backend
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx, d_merged, d_projected, _):
    refuse_second_derivatives()
    x, weight, bias, mask, cu, norm_weight, norm_bias, projection, weights = ctx.saved_tensors
    backward = torch.ops.variator.group_merge_backward
    dx, d_weight, d_bias, d_projection, d_norm_weight, d_norm_bias = backward(
        d_merged, d_projected, x, weights, weight, mask, cu, ctx.norm, norm_weight, norm_bias,
        ctx.eps, projection, ctx.backend,
    )  # fmt: skip
    return (
        dx,
        d_weight.to(weight.dtype),
        d_bias.to(bias.dtype),
        None,
        None,
        None,
        None if norm_weight is None else d_norm_weight.to(norm_weight.dtype),
        None if norm_bias is None else d_norm_bias.to(norm_bias.dtype),
        None,
        None if projection is None else d_projection.to(projection.dtype),
        None,
    )


torch.library.register_autograd("variator::group_merge", _gradients, setup_context=_setup)
