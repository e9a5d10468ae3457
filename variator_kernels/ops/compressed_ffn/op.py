"""compressed_ffn as a registered op: schema, fake, autograd.

The op keeps nothing but its inputs; its backward pass runs the layer again step by step. Training
goes through :mod:`layered` instead, which keeps what is small and so runs the FFN once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_adapter, check_ffn, check_merge
from ..feed_forward import FeedForward, PluginWeights
from ..groups import FIELDS, SCHEMA, Groups
from ..library import LIBRARY, backend_module, define, refuse_second_derivatives
from ..transforms import nothing_between, refuse_transforms
from . import layered

_ARGUMENTS = (
    "Tensor x, Tensor merge_weight, Tensor merge_bias, Tensor w1, Tensor b1, Tensor w2, Tensor b2,"
    " Tensor w_in, Tensor w_out, Tensor? w_gate, Tensor? b_in, Tensor? b_out, Tensor? b_gate,"
    f" Tensor? norm_weight, Tensor? norm_bias, {SCHEMA}, str activation, str norm, float eps,"
    " bool post_norm, bool residual, str adapter_activation, str backend,"
    " bool pack=True, str? precision=None,"
    " Tensor? in_scales=None, Tensor? out_scales=None, Tensor? gate_scales=None"
)
_DEFAULTS: tuple[Any, ...] = (True, None, None, None, None)  # of what follows the backend
_WEIGHTS = 15  # the leading arguments that have gradients; the groups' tensors follow
_TENSORS = _WEIGHTS + 5

define(f"compressed_ffn({_ARGUMENTS}) -> Tensor")
define(f"compressed_ffn_backward(Tensor dy, {_ARGUMENTS}) -> Tensor[]")


class _Call(NamedTuple):
    """The arguments of the op, bundled."""

    x: Tensor
    plugin: PluginWeights
    ffn: FeedForward
    groups: Groups
    backend: str


def _bundle(arguments: tuple) -> _Call:
    w_in, w_out, w_gate, b_in, b_out, b_gate, norm_weight, norm_bias = arguments[7:_WEIGHTS]
    rest = arguments[_WEIGHTS + FIELDS :]
    activation, norm, eps, post_norm, residual, phi, backend, *options = rest
    # Programs of older versions do not say.
    pack, precision, *scales = [*options, *_DEFAULTS[len(options) :]]
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
        pack=pack,
        precision=precision,
        scales=(scales[0], scales[1], scales[2]),
    )
    merge_weight, merge_bias, w1, b1, w2, b2 = arguments[1:7]
    plugin = PluginWeights(merge_weight, merge_bias, w1, b1, w2, b2, phi)
    groups = Groups(*arguments[_WEIGHTS : _WEIGHTS + FIELDS])
    return _Call(arguments[0], plugin, ffn, groups, backend)


def compressed_ffn(
    x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups, backend: str
) -> Tensor:
    """The sublayer without dropout, in one op; inference goes past PyTorch's dispatcher."""
    norm = ffn.norm_weight, ffn.norm_bias
    if backend == "cpu" and nothing_between((x, *plugin[:6], *ffn[:6], *norm, *groups[:5])):
        return backend_module(__package__, backend).compressed_ffn(x, plugin, ffn, groups)
    return torch.ops.variator.compressed_ffn.default(
        x, *plugin[:6], *ffn[:6], ffn.norm_weight, ffn.norm_bias, *groups, ffn.activation,
        ffn.norm, ffn.eps, ffn.post_norm, ffn.residual, plugin.activation, backend,
        ffn.pack, ffn.precision, *ffn.scales,
    )  # fmt: skip


@torch.library.impl(LIBRARY, "compressed_ffn", "CompositeExplicitAutograd")
def _forward(*arguments):
    call = _bundle(arguments)
    # Anyone may call the op; what comes by the public function was checked there.
    if call.backend in ("triton", "cuda"):
        check_merge(call.x, call.plugin.merge, call.groups, call.ffn.pre_norm)
        check_adapter(call.plugin.adapter, call.x.shape[-1], call.plugin.b1.shape[0])
        check_ffn(call.x.shape[-1], call.ffn[:6], call.ffn.any_norm)
    return backend_module(__package__, call.backend).compressed_ffn(*call[:4])


@torch.library.impl(LIBRARY, "compressed_ffn_backward", "CompositeExplicitAutograd")
def _backward(dy, *arguments):
    refuse_transforms((dy, *arguments))
    if _bundle(arguments).ffn.scales != (None, None, None):
        raise RuntimeError("compressed_ffn with weights in int8 is for inference: no gradients")
    leaves = list(arguments)
    for i in range(_WEIGHTS):
        if leaves[i] is not None:
            leaves[i] = leaves[i].detach().requires_grad_()
    with torch.enable_grad():
        call = _bundle(tuple(leaves))
        # Gradients are those of the products that are not rounded.
        ffn = call.ffn._replace(precision=None)
        y = layered.compressed_ffn(*call._replace(ffn=ffn))
        wanted = [leaf for leaf in leaves[:_WEIGHTS] if leaf is not None]
        # A norm that is "none" uses no weight.
        return list(torch.autograd.grad(y, wanted, dy, allow_unused=True, materialize_grads=True))


@torch.library.register_fake("variator::compressed_ffn")
def _fake(*arguments):
    x, w_out = arguments[0], arguments[8]
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, w_out.dtype))


@torch.library.register_fake("variator::compressed_ffn_backward")
def _fake_backward(dy, *arguments):
    return [torch.empty_like(tensor) for tensor in arguments[:_WEIGHTS] if tensor is not None]


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.rest = inputs[_TENSORS:]


def _gradients(ctx, dy):
    refuse_second_derivatives()
    refuse_transforms((dy,))
    tensors = ctx.saved_tensors
    backward = torch.ops.variator.compressed_ffn_backward.default
    found = iter(backward(dy, *tensors, *ctx.rest))
    gradients = [None if t is None else next(found) for t in tensors[:_WEIGHTS]]
    return (*gradients, *(None,) * (_TENSORS - _WEIGHTS + len(ctx.rest)))


torch.library.register_autograd(
    "variator::compressed_ffn", _gradients, setup_context=_setup, lib=LIBRARY
)
