"""adapter_decompress as a registered op: schema, fake, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import LIBRARY, backend_module, define, refuse_second_derivatives

define(
    "adapter_decompress(Tensor u, Tensor projected, Tensor w1u, Tensor b1, Tensor w2, Tensor b2,"
    " Tensor? residual, Tensor? mask, Tensor? cu_seqlens, int ratio, str activation, str backend)"
    " -> Tensor"
)
define(
    "adapter_decompress_backward(Tensor dy, Tensor u, Tensor projected, Tensor w1u, Tensor b1,"
    " Tensor w2, Tensor? mask, Tensor? cu_seqlens, int ratio, str activation, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def adapter_decompress(
    u: Tensor,
    projected: Tensor,
    w1u: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ratio: int,
    activation: str,
    backend: str,
) -> Tensor:
    """``[residual +] u + W_2 φ(W_1u u + projected + b_1) + b_2`` for each token of a group.

    ``u [..., G, d]``; ``projected [..., n, r]`` is ``W_1h h``; ``w1u [r, d]`` is W_1's first half.
    Where there is no token the result is the residual, or 0.
    """
    return torch.ops.variator.adapter_decompress(
        u, projected, w1u, b1, w2, b2, residual, mask, cu_seqlens, ratio, activation, backend
    )


@torch.library.impl(LIBRARY, "adapter_decompress", "CompositeExplicitAutograd")
def _forward(u, projected, w1u, b1, w2, b2, residual, mask, cu, ratio, activation, backend):
    module = backend_module(__package__, backend)
    return module.adapter_decompress(
        u, projected, w1u, b1, w2, b2, residual, mask, cu, ratio, activation
    )


@torch.library.impl(LIBRARY, "adapter_decompress_backward", "CompositeExplicitAutograd")
def _backward(dy, u, projected, w1u, b1, w2, mask, cu, ratio, activation, backend):
    module = backend_module(__package__, backend)
    return module.adapter_decompress_backward(
        dy, u, projected, w1u, b1, w2, mask, cu, ratio, activation
    )


@torch.library.register_fake("variator::adapter_decompress")
def _fake(u, projected, w1u, b1, w2, b2, residual, mask, cu, ratio, activation, backend):
    return u.new_empty(*projected.shape[:-1], u.shape[-1])


@torch.library.register_fake("variator::adapter_decompress_backward")
def _fake_backward(dy, u, projected, w1u, b1, w2, mask, cu, ratio, activation, backend):
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    r, d = w1u.shape
    return (
        u.new_empty(u.shape if u.dim() == 2 else (u.shape[0] * u.shape[1], d)),
        projected.new_empty(projected.shape, dtype=wide),
        u.new_empty(r, d, dtype=wide),
        u.new_empty(r, dtype=wide),
        u.new_empty(d, r, dtype=wide),
        u.new_empty(d, dtype=wide),
    )


def _setup(ctx, inputs, output):
    u, projected, w1u, b1, w2, b2, residual, mask, cu, ratio, activation, backend = inputs
    ctx.save_for_backward(u, projected, w1u, b1, w2, mask, cu)
    ctx.ratio, ctx.activation, ctx.backend = ratio, activation, backend
    ctx.b2_dtype = b2.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _gradients(ctx, dy):
    refuse_second_derivatives()
    u, projected, w1u, b1, w2, mask, cu = ctx.saved_tensors
    du, d_projected, d_w1u, d_b1, d_w2, d_b2 = torch.ops.variator.adapter_decompress_backward(
        dy, u, projected, w1u, b1, w2, mask, cu, ctx.ratio, ctx.activation, ctx.backend
    )
    return (
        du.reshape(u.shape),
        d_projected.to(projected.dtype),
        d_w1u.to(w1u.dtype),
        d_b1.to(b1.dtype),
        d_w2.to(w2.dtype),
        d_b2.to(ctx.b2_dtype),
        None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype),
        *(None,) * 5,
    )


torch.library.register_autograd("variator::adapter_decompress", _gradients, setup_context=_setup)
