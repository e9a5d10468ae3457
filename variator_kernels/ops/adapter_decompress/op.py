"""adapter_decompress as a registered op: schema, fake, autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import AdapterWeights
from ..groups import FIELDS, SCHEMA, Groups
from ..library import LIBRARY, accumulator, backend_module, define, refuse_second_derivatives
from ..transforms import refuse_transforms

_ARGUMENTS = (
    "Tensor u, Tensor projected, Tensor w1u, Tensor b1, Tensor w2, Tensor b2, Tensor? residual,"
    f" {SCHEMA}, str activation, str backend"
)
_TENSORS = 7 + 5  # the leading arguments that are tensors: weights, and the groups'
_DIFFERENTIABLE = range(6)
_RESIDUAL = 6

define(f"adapter_decompress({_ARGUMENTS}) -> Tensor")
# The residual's gradient is dy; it is not among the arguments of the backward pass.
define(
    f"adapter_decompress_backward(Tensor dy, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class _Call(NamedTuple):
    """The arguments of the op, bundled."""

    u: Tensor
    projected: Tensor
    adapter: AdapterWeights
    residual: Tensor | None
    groups: Groups
    backend: str


def _bundle(arguments: tuple) -> _Call:
    u, projected, w1u, b1, w2, b2, residual = arguments[:7]
    activation, backend = arguments[7 + FIELDS :]
    return _Call(
        u,
        projected,
        AdapterWeights(w1u, b1, w2, b2, activation),
        residual,
        Groups(*arguments[7 : 7 + FIELDS]),
        backend,
    )


def adapter_decompress(
    u: Tensor,
    projected: Tensor,
    adapter: AdapterWeights,
    residual: Tensor | None,
    groups: Groups,
    backend: str,
) -> Tensor:
    """``[residual +] u + W_2 φ(W_1u u + projected + b_1) + b_2`` for each token of a group.

    ``u [..., G, d]``; ``projected [..., n, r]`` is ``W_1h h``. Where there is no token the result
    is the residual, or 0.
    """
    return torch.ops.variator.adapter_decompress.default(
        u, projected, *adapter[:4], residual, *groups, adapter.activation, backend
    )


@torch.library.impl(LIBRARY, "adapter_decompress", "CompositeExplicitAutograd")
def _forward(*arguments):
    call = _bundle(arguments)
    return backend_module(__package__, call.backend).adapter_decompress(*call[:5])


@torch.library.impl(LIBRARY, "adapter_decompress_backward", "CompositeExplicitAutograd")
def _backward(dy, *arguments):
    refuse_transforms((dy, *arguments))
    u, projected, adapter, _, groups, backend = _bundle(arguments)
    module = backend_module(__package__, backend)
    return module.adapter_decompress_backward(dy, u, projected, adapter, groups)


@torch.library.register_fake("variator::adapter_decompress")
def _fake(*arguments):
    u, projected = arguments[:2]
    return u.new_empty(*projected.shape[:-1], u.shape[-1])


@torch.library.register_fake("variator::adapter_decompress_backward")
def _fake_backward(dy, *arguments):
    u, projected, w1u = arguments[:3]
    r, d = w1u.shape
    wide = accumulator(u.dtype)
    return (
        u.new_empty(u.shape if u.dim() == 2 else (u.shape[0] * u.shape[1], d)),
        projected.new_empty(projected.shape, dtype=wide),
        u.new_empty(r, d, dtype=wide),
        u.new_empty(r, dtype=wide),
        u.new_empty(d, r, dtype=wide),
        u.new_empty(d, dtype=wide),
    )


def _setup(ctx, inputs, output):
    residual = inputs[_RESIDUAL]
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(*inputs[:_RESIDUAL], *inputs[_RESIDUAL + 1 : _TENSORS])
    ctx.rest = inputs[_TENSORS:]


def _gradients(ctx, dy):
    refuse_second_derivatives()
    refuse_transforms((dy,))
    tensors = ctx.saved_tensors
    weights, lists = tensors[:_RESIDUAL], tensors[_RESIDUAL:]
    backward = torch.ops.variator.adapter_decompress_backward.default
    found = backward(dy, *weights, None, *lists, *ctx.rest)
    gradients = [None] * (_TENSORS + len(ctx.rest))
    for i in _DIFFERENTIABLE:
        gradients[i] = found[i].to(weights[i].dtype)
    gradients[0] = found[0].reshape(weights[0].shape)
    if ctx.residual_dtype is not None:
        gradients[_RESIDUAL] = dy.to(ctx.residual_dtype)
    return tuple(gradients)


torch.library.register_autograd(
    "variator::adapter_decompress", _gradients, setup_context=_setup, lib=LIBRARY
)
