"""Linear layers whose weights are int8 already, by torchao or torch.ao: read as they are, or why
they run as the modules that they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.frozen_linear import is_plain_class, is_plain_weight
from ..ops.int8_linear import StoredWeight, torchao
from ..ops.int8_linear.module import StoredProduct
from .plain import kind_of, untouched
from .watch import Watch

_TORCH_AO = ("torch.ao.nn.quantized.dynamic.modules.linear", "Linear")
"""By name: it is imported by those who quantise."""


def stored_product(linear: Any) -> StoredProduct | str:
    """The product of a layer whose weight is int8 with a scale, or one an output channel, and no
    zero point; else why it runs as a module."""
    kind = kind_of(linear)
    if not untouched(linear):
        return "hooked, or with a forward of somebody's own"
    if (kind.__module__, kind.__name__) == _TORCH_AO:
        weight: StoredWeight | str = _torch_ao(linear)
        bias = linear.bias()
    elif is_plain_class(kind):
        weight, bias = torchao.read(linear.weight), linear.bias
    else:
        return f"{kind.__module__.split('.')[0]} {kind.__name__}"
    if isinstance(weight, str):
        return weight
    if bias is not None and not is_plain_weight(bias):
        return f"bias is a {type(bias).__name__}"
    return StoredProduct(linear, weight, None if bias is None else bias.detach())


def stored_products(linears: Iterable[Any]) -> list[StoredProduct] | str:
    """The same of layers that one kernel runs: all of them are int8, in one way."""
    found = [stored_product(linear) for linear in linears]
    reasons = [product for product in found if isinstance(product, str)]
    if reasons:
        return next((reason for reason in reasons if reason), "beside layers in int8")
    products = [product for product in found if not isinstance(product, str)]
    if len({product.weight.dynamic for product in products}) > 1:
        return "int8 weights with and without activations in int8 in one sublayer"
    return products


def _torch_ao(linear: Any) -> StoredWeight | str:
    """Made anew in each call: the layer keeps it in a form of its backend."""
    name = "torch.ao dynamic Linear"
    if linear._packed_params.dtype != torch.qint8:
        return f"{name} of {linear._packed_params.dtype}"
    weight: Tensor = linear.weight()
    if weight.qscheme() == torch.per_tensor_affine:
        scales, zeros = torch.tensor([weight.q_scale()]), torch.tensor(weight.q_zero_point())
    elif weight.qscheme() == torch.per_channel_affine and weight.q_per_channel_axis() == 0:
        scales, zeros = weight.q_per_channel_scales().float(), weight.q_per_channel_zero_points()
    else:
        return f"{name} of {weight.qscheme()}"
    if bool(zeros.any()):
        return f"{name} with zero points"
    return StoredWeight(weight.int_repr(), scales, True)


def watch_stored(watch: Watch, linear: nn.Module) -> None:
    """Watch what :func:`stored_product` looks at inside of a weight."""
    weight = linear._parameters.get("weight")
    if weight is not None and not is_plain_weight(weight) and hasattr(weight, "__dict__"):
        watch.entries(vars(weight), torchao.FIELDS)
    packed = linear._modules.get("_packed_params")
    if packed is not None:
        watch.entries(vars(packed), ("_packed_params", "dtype"))
