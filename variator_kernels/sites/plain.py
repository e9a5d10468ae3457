"""Whether a module is no more than it seems: nothing replaced, hooked, quantised or sharded."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx.experimental import proxy_tensor

from ..ops.frozen_linear import is_plain_class, is_plain_weight
from ..ops.prepacked_linear import Forward
from .find import replaced

_ACTIVATIONS = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}
_CAPTURES = "transformers.utils.output_capturing"
_PROXY: Any = getattr(proxy_tensor, "_AttrProxy", None)


def untouched(module: nn.Module) -> bool:
    """Nobody replaced its ``forward`` or hooked it; packed products are what it is."""
    packed = isinstance(module.__dict__.get("forward"), Forward)
    # Those by which transformers takes attention weights and hidden states wait until asked.
    hooks = [hook for hook in module._forward_hooks.values() if _home(hook) != _CAPTURES]
    return (packed or not replaced(module)) and not (
        hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _home(hook: Any) -> str | None:
    return getattr(hook, "__module__", None)


def kind_of(module: nn.Module) -> type:
    """Its class, without what ``torch.export`` may put around a module that it traces."""
    kinds = type(module).__mro__
    return kinds[kinds.index(_PROXY) + 1] if _PROXY in kinds else kinds[0]


def plain_linear(linear: nn.Module) -> bool:
    """Its weight is all it is: no subclass of either (quantised, sharded), no hook."""
    return is_plain_class(kind_of(linear)) and is_plain_weight(linear.weight) and untouched(linear)


def plain_embedding(table: nn.Module) -> bool:
    """The same of an embedding."""
    return kind_of(table) is nn.Embedding and is_plain_weight(table.weight) and untouched(table)


def activation_name(act: Any) -> str | None:
    """The name of a recognised activation, or None."""
    if not isinstance(act, nn.Module) or not untouched(act):
        return None
    kind = kind_of(act)
    if kind is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    ours = kind.__module__.split(".")[0] in ("torch", "transformers")
    return _ACTIVATIONS.get(kind.__name__) if ours else None
