"""grouped_attention as a registered op: schema, fake, autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..library import LIBRARY, accumulator, backend_module, define, refuse_second_derivatives
from ..transforms import nothing_between, refuse_transforms
from .reference import Visible
from .relative import DistanceBias

_ARGUMENTS = (
    "Tensor queries, Tensor keys, Tensor values, Tensor? bias, Tensor? first, Tensor? last,"
    " Tensor? distance_values, Tensor? query_positions, Tensor? key_positions, Tensor? pattern,"
    " int origin, float scale, str backend"
)
_TENSORS = 10
_FORWARD = 13
_RELATIVE = 6
"""Where the distance terms begin: the kernels have no gradient for them."""

define(f"grouped_attention({_ARGUMENTS}) -> Tensor")
define(
    f"grouped_attention_backward(Tensor d_out, {_ARGUMENTS}, bool d_bias=True)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


class Attention(NamedTuple):
    """The arguments of the op, bundled."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    visible: Visible
    relative: DistanceBias | None
    scale: float


def _bundle(arguments: tuple) -> tuple[Attention, str]:
    table, *positions, origin, scale, backend = arguments[_RELATIVE:]
    queries, keys, pattern = positions
    relative = None if table is None else DistanceBias(table, queries, keys, pattern, origin)
    q, k, v = arguments[:3]
    return Attention(q, k, v, Visible(*arguments[3:6]), relative, scale), backend


def grouped_attention(call: Attention, backend: str) -> Tensor:
    """Attention of whole queries over groups' keys, ``[B, n, H, d]``; see :class:`Attention`.

    The way through PyTorch's dispatcher takes longer than a kernel of few queries, so inference
    goes past it.
    """
    relative = call.relative or (None,) * 4 + (0,)
    if nothing_between((*call[:3], *call.visible, *relative[:4])):
        return backend_module(__package__, backend).grouped_attention(call)
    return torch.ops.variator.grouped_attention.default(
        *call[:3], *call.visible, *relative, call.scale, backend
    )


@torch.library.impl(LIBRARY, "grouped_attention", "CompositeExplicitAutograd")
def _forward(*arguments):
    call, backend = _bundle(arguments)
    return backend_module(__package__, backend).grouped_attention(call)


@torch.library.impl(LIBRARY, "grouped_attention_backward", "CompositeExplicitAutograd")
def _backward(d_out, *arguments):
    refuse_transforms((d_out, *arguments))
    # The dispatcher leaves out what is at its default.
    arguments, wanted = arguments[:_FORWARD], arguments[_FORWARD:] != (False,)
    call, backend = _bundle(arguments)
    module = backend_module(__package__, backend)
    return module.grouped_attention_backward(d_out, call, wanted)


@torch.library.register_fake("variator::grouped_attention")
def _fake(*arguments):
    queries = arguments[0]
    return queries.new_empty(queries.shape)


@torch.library.register_fake("variator::grouped_attention_backward")
def _fake_backward(d_out, *arguments):
    queries, keys, values = arguments[:3]
    wide = accumulator(queries.dtype)
    return (
        queries.new_empty(queries.shape),
        keys.new_empty(keys.shape),
        values.new_empty(values.shape),
        keys.new_empty(keys.shape[:2], dtype=wide),
    )


def _setup(ctx, inputs, output):
    if inputs[_RELATIVE] is not None and inputs[_RELATIVE].requires_grad:
        raise ValueError(
            "the kernels have no gradient for the terms of distances (T5's table); freeze the "
            "table, or use backend='reference'"
        )
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.rest = inputs[_TENSORS:]


def _gradients(ctx, d_out):
    refuse_second_derivatives()
    refuse_transforms((d_out,))
    tensors = ctx.saved_tensors
    backward = torch.ops.variator.grouped_attention_backward.default
    found = backward(d_out, *tensors, *ctx.rest, ctx.needs_input_grad[3])
    gradients = [None] * (_TENSORS + len(ctx.rest))
    for i in range(4):
        if tensors[i] is not None:
            gradients[i] = found[i].to(tensors[i].dtype)
    return tuple(gradients)


torch.library.register_autograd(
    "variator::grouped_attention", _gradients, setup_context=_setup, lib=LIBRARY
)
