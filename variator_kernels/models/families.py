"""Where each Hugging Face family keeps its FFN sublayers, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..feed_forward import FeedForward


@dataclass(frozen=True)
class Family:
    """One family's names. Paths are dotted attributes; a number in them is an index."""

    name: str
    """``config.model_type``."""
    module: str
    """The module that defines its classes."""
    encoder: str
    """The stack that takes ``attention_mask``; an attribute ``is_decoder`` excludes a decoder's."""
    block: str
    layer: str
    """The FFN sublayer, norm to residual."""
    norm_class: str
    blocks: str = "block"
    """From the encoder to its blocks."""
    sublayer: str = "layer.-1"
    """From a block to its FFN sublayer."""
    norm: str = "layer_norm"
    norm_kind: str = "rms"
    eps: tuple[str, ...] = ("variance_epsilon", "eps")
    """The norm's epsilon: the first that is there (a fused norm may stand in)."""
    post_norm: bool = False
    outer_dropout: str = "dropout"
    dense: str = "DenseReluDense"
    """From the sublayer to the FFN proper."""
    dense_classes: tuple[str, ...] = ()
    w_in: tuple[str, ...] = ("wi", "wi_0")
    """The product under the activation: the first that is there."""
    w_gate: str = "wi_1"
    """The product beside it, if there is one."""
    w_out: str = "wo"
    act: str = "act"
    inner_dropout: str = "dropout"


def _t5(name: str, prefix: str) -> Family:
    return Family(
        name=name,
        module=f"transformers.models.{name}.modeling_{name}",
        encoder=f"{prefix}Stack",
        block=f"{prefix}Block",
        layer=f"{prefix}LayerFF",
        norm_class=f"{prefix}LayerNorm",
        dense_classes=(f"{prefix}DenseActDense", f"{prefix}DenseGatedActDense"),
    )


T5_FAMILIES = (_t5("t5", "T5"), _t5("mt5", "MT5"), _t5("umt5", "UMT5"))
FAMILIES = {family.name: family for family in T5_FAMILIES}
ROW = "variator_family"
"""Class attribute of a patched class: its :class:`Family`."""

_BY_LAYER = {family.layer: family for family in FAMILIES.values()}
_ACTIVATIONS = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


def follow(module: Any, path: str) -> Any:
    """``follow(block, "layer.-1")`` is ``block.layer[-1]``."""
    for name in path.split("."):
        module = module[int(name)] if name.lstrip("-").isdigit() else getattr(module, name)
    return module


def describe(layer: nn.Module) -> FeedForward:
    """What the FFN sublayer ``layer`` consists of now; cheap, and traceable by ``torch.compile``.

    Plain products where the weights tell all that the FFN does; otherwise (replaced, quantised,
    parametrised or hooked linear layers, an unknown activation) ``module`` is the FFN itself.

    Raises:
        TypeError: ``layer`` is not an FFN sublayer of a known family, or its norm or its dropout,
            which the kernels replace, was replaced or hooked.
    """
    family = getattr(type(layer), ROW, None) or _BY_LAYER.get(type(layer).__name__)
    if family is None:
        raise TypeError(
            f"ffn must be an FFN sublayer of a known family, {tuple(_BY_LAYER)}, or have a "
            f"feed_forward(), got {type(layer).__name__}"
        )
    norm, dense = getattr(layer, family.norm), getattr(layer, family.dense)
    for name in (family.norm, family.outer_dropout):
        part = getattr(layer, name)
        home = type(part).forward.__module__
        if not _untouched(part) or home.split(".")[0] not in ("torch", "transformers", "apex"):
            raise TypeError(
                f"{name} of {type(layer).__name__} was replaced or hooked ({type(part).__name__}): "
                "the compressed layer would pass it by; unpatch the model to use it"
            )
    eps = next(getattr(norm, name) for name in family.eps if hasattr(norm, name))
    outer = _probability(getattr(layer, family.outer_dropout))
    weight: Tensor = norm.weight
    bias: Tensor | None = getattr(norm, "bias", None)
    w_in = [getattr(dense, name) for name in family.w_in if hasattr(dense, name)]
    w_gate = getattr(dense, family.w_gate, None)
    w_out: Any = getattr(dense, family.w_out, None)
    activation = _activation(getattr(dense, family.act, None))
    plain = (
        len(w_in) == 1
        and _untouched(dense)
        and type(dense).__name__ in family.dense_classes
        and type(dense).forward.__module__ == family.module
        and all(_plain_linear(p) for p in (w_in[0], w_out))
        and (w_gate is None or _plain_linear(w_gate))
    )
    if not plain or activation is None:
        # The products are not looked at then: the norm's weight only stands in for a tensor.
        return FeedForward(
            weight,
            weight,
            norm=family.norm_kind,
            norm_weight=weight,
            norm_bias=bias,
            eps=eps,
            post_norm=family.post_norm,
            dropout_outer=outer,
            module=dense,
        )
    return FeedForward(
        w_in[0].weight,
        w_out.weight,
        None if w_gate is None else w_gate.weight,
        w_in[0].bias,
        w_out.bias,
        None if w_gate is None else w_gate.bias,
        activation,
        family.norm_kind,
        weight,
        bias,
        eps,
        family.post_norm,
        _probability(getattr(dense, family.inner_dropout)),
        outer,
    )


def _untouched(module: nn.Module) -> bool:
    """Nobody replaced its ``forward`` or hooked it."""
    return not (
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _plain_linear(linear: nn.Module) -> bool:
    """Its weight is all it is: no subclass of either (quantised, sharded), no hook."""
    return (
        type(linear) is nn.Linear
        and type(linear.weight) in (nn.Parameter, Tensor)
        and _untouched(linear)
    )


def _probability(dropout: nn.Module) -> float:
    return getattr(dropout, "p", 0.0) if dropout.training else 0.0


def _activation(act: Any) -> str | None:
    """The name of a recognised activation, or None."""
    kind = type(act)
    if kind is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    known = _ACTIVATIONS.get(kind.__name__)
    if known is None or kind.__module__.split(".")[0] not in ("torch", "transformers"):
        return None
    return known if isinstance(act, nn.Module) and _untouched(act) else None
