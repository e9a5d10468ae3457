"""compressed_ffn as a registered op: schema, fake, autograd.

The op keeps nothing but its inputs; its backward pass runs the layer again step by step. Training
goes through :mod:`layered` instead, which keeps what is small and so runs the FFN once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..feed_forward import FeedForward, PluginWeights
from ..library import LIBRARY, backend_module, define, refuse_second_derivatives
from . import layered

_ARGUMENTS = (
    "Tensor x, Tensor? mask, Tensor? cu_seqlens, Tensor merge_weight, Tensor merge_bias, Tensor w1,"
    " Tensor b1, Tensor w2, Tensor b2, Tensor w_in, Tensor w_out, Tensor? w_gate, Tensor? b_in,"
    " Tensor? b_out, Tensor? b_gate, Tensor? norm_weight, Tensor? norm_bias, str activation,"
    " str norm, float eps, bool post_norm, bool residual, str adapter_activation, str backend"
)
_TENSORS = 17  # the leading arguments that are tensors
_DIFFERENTIABLE = (0, *range(3, _TENSORS))

define(f"compressed_ffn({_ARGUMENTS}) -> Tensor")
define(f"compressed_ffn_backward(Tensor dy, {_ARGUMENTS}) -> Tensor[]")


def compressed_ffn(
    x: Tensor,
    plugin: PluginWeights,
    ffn: FeedForward,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Tensor:
    """The sublayer without dropout, in one op."""
    return torch.ops.variator.compressed_ffn.default(
        x, mask, cu_seqlens, *plugin[:6], ffn.w_in, ffn.w_out, ffn.w_gate, ffn.b_in, ffn.b_out,
        ffn.b_gate, ffn.norm_weight, ffn.norm_bias, ffn.activation, ffn.norm, ffn.eps,
        ffn.post_norm, ffn.residual, plugin.activation, backend,
    )  # fmt: skip


def _unflatten(
    arguments: tuple,
) -> tuple[Tensor, PluginWeights, FeedForward, Tensor | None, Tensor | None, str]:
    x, mask, cu_seqlens = arguments[:3]
    w_in, w_out, w_gate, b_in, b_out, b_gate, norm_weight, norm_bias = arguments[9:_TENSORS]
    activation, norm, eps, post_norm, residual, phi, backend = arguments[_TENSORS:]
    merge_weight, merge_bias, w1, b1, w2, b2 = arguments[3:9]
    plugin = PluginWeights(merge_weight, merge_bias, w1, b1, w2, b2, phi)
    ffn = FeedForward(
        w_in,
        w_out,
        w_gate,
        b_in,
        b_out,
        b_gate,
        activation,
        norm,
        norm_weight,
        norm_bias,
        eps,
        post_norm,
        residual,
    )
    return x, plugin, ffn, mask, cu_seqlens, backend


@torch.library.impl(LIBRARY, "compressed_ffn", "CompositeExplicitAutograd")
def _forward(*arguments):
    x, plugin, ffn, mask, cu_seqlens, backend = _unflatten(arguments)
    module = backend_module(__package__, backend)
    return module.compressed_ffn(x, plugin, ffn, mask, cu_seqlens)


@torch.library.impl(LIBRARY, "compressed_ffn_backward", "CompositeExplicitAutograd")
def _backward(dy, *arguments):
    leaves = list(arguments)
    for i in _DIFFERENTIABLE:
        if leaves[i] is not None:
            leaves[i] = leaves[i].detach().requires_grad_()
    with torch.enable_grad():
        y = layered.compressed_ffn(*_unflatten(tuple(leaves)))
        wanted = [leaves[i] for i in _DIFFERENTIABLE if leaves[i] is not None]
        # A norm that is "none" uses no weight.
        return list(torch.autograd.grad(y, wanted, dy, allow_unused=True, materialize_grads=True))


@torch.library.register_fake("variator::compressed_ffn")
def _fake(*arguments):
    x, w_out = arguments[0], arguments[10]
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, w_out.dtype))


@torch.library.register_fake("variator::compressed_ffn_backward")
def _fake_backward(dy, *arguments):
    return [torch.empty_like(arguments[i]) for i in _DIFFERENTIABLE if arguments[i] is not None]


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.rest = inputs[_TENSORS:]


def _gradients(ctx, dy):
    refuse_second_derivatives()
    tensors = ctx.saved_tensors
    found = iter(torch.ops.variator.compressed_ffn_backward(dy, *tensors, *ctx.rest))
    gradients = [None] * (_TENSORS + len(ctx.rest))
    for i in _DIFFERENTIABLE:
        if tensors[i] is not None:
            gradients[i] = next(found)
    return tuple(gradients)


torch.library.register_autograd("variator::compressed_ffn", _gradients, setup_context=_setup)
