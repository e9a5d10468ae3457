"""group_merge as a registered op: schema, fake, autograd. Backends are modules of functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import MergeWeights, Norm
from ..groups import FIELDS, SCHEMA, Groups
from ..library import LIBRARY, accumulator, backend_module, define, refuse_second_derivatives
from ..transforms import refuse_transforms

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor bias, Tensor? projection, Tensor? norm_weight,"
    f" Tensor? norm_bias, {SCHEMA}, str norm, float eps, str backend"
)
_TENSORS = 6 + 5  # the leading arguments that are tensors: weights, and the groups'
_DIFFERENTIABLE = range(6)

define(f"group_merge({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
define(
    f"group_merge_backward(Tensor d_merged, Tensor d_projected, Tensor softmax, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class _Call(NamedTuple):
    """The arguments of the op, bundled."""

    x: Tensor
    merge: MergeWeights
    groups: Groups
    norm: Norm
    backend: str


def _bundle(arguments: tuple) -> _Call:
    x, weight, bias, projection, norm_weight, norm_bias = arguments[:6]
    norm, eps, backend = arguments[6 + FIELDS :]
    return _Call(
        x,
        MergeWeights(weight, bias, projection),
        Groups(*arguments[6 : 6 + FIELDS]),
        Norm(norm, norm_weight, norm_bias, eps),
        backend,
    )


def group_merge(
    x: Tensor, merge: MergeWeights, groups: Groups, norm: Norm, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges ``h = norm(x)`` and, on the way, projects it.

    Returns ``merged`` (as :func:`variator_kernels.functional.group_merge`), ``projected``
    ``[..., n, r]`` = ``projection · h`` (accumulator dtype; r = 0 without a projection; 0 where
    there is no token) and the ``softmax`` weights ``[..., G, k]``.
    """
    return torch.ops.variator.group_merge.default(
        x, *merge, norm.weight, norm.bias, *groups, norm.name, norm.eps, backend
    )


@torch.library.impl(LIBRARY, "group_merge", "CompositeExplicitAutograd")
def _forward(*arguments):
    call = _bundle(arguments)
    return backend_module(__package__, call.backend).group_merge(*call[:4])


@torch.library.impl(LIBRARY, "group_merge_backward", "CompositeExplicitAutograd")
def _backward(d_merged, d_projected, softmax, *arguments):
    refuse_transforms((d_merged, d_projected, softmax, *arguments))
    call = _bundle(arguments)
    module = backend_module(__package__, call.backend)
    return module.group_merge_backward(d_merged, d_projected, softmax, *call[:4])


@torch.library.register_fake("variator::group_merge")
def _fake(*arguments):
    x, merge, groups, _, _ = _bundle(arguments)
    shape, wide = groups.shape(x), accumulator(x.dtype)
    return (
        x.new_empty(*shape, x.shape[-1]),
        x.new_empty(*x.shape[:-1], merge.bottleneck, dtype=wide),
        x.new_empty(*shape, groups.ratio, dtype=wide),
    )


@torch.library.register_fake("variator::group_merge_backward")
def _fake_backward(d_merged, d_projected, softmax, *arguments):
    x, merge, groups, norm, _ = _bundle(arguments)
    k, d, wide = groups.ratio, x.shape[-1], accumulator(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(k, k * d, dtype=wide),
        x.new_empty(k, dtype=wide),
        x.new_empty(merge.bottleneck, d, dtype=wide),
        x.new_empty(0 if norm.weight is None else d, dtype=wide),
        x.new_empty(0 if norm.bias is None else d, dtype=wide),
    )


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_TENSORS], output[2])
    ctx.rest = inputs[_TENSORS:]
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx, d_merged, d_projected, _):
    refuse_second_derivatives()
    refuse_transforms((d_merged, d_projected))
    *tensors, softmax = ctx.saved_tensors
    backward = torch.ops.variator.group_merge_backward.default
    found = backward(d_merged, d_projected, softmax, *tensors, *ctx.rest)
    gradients = [None] * (_TENSORS + len(ctx.rest))
    for i in _DIFFERENTIABLE:
        if tensors[i] is not None:
            gradients[i] = found[i].to(tensors[i].dtype)
    return tuple(gradients)


torch.library.register_autograd(
    "variator::group_merge", _gradients, setup_context=_setup, lib=LIBRARY
)
