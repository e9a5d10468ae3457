"""What is known of calls by the forms of their tensors: worked out once for calls that look alike.

A tensor's form is all there is to it but its numbers and their address: type, dtype, device, sizes,
strides, whether it asks for a gradient, what is still to be applied to it. Other numbers keep it,
``.data`` of another size or dtype does not. Layers of one model have the same forms.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from .feed_forward import FeedForward, PluginWeights
from .transforms import of_memory, tracing

try:
    import torch._C._dynamo.guards as guards
except ImportError:  # nobody promises it: then each call is looked at anew
    guards = None  # type: ignore[assignment]


class Forms:
    """Of tensors that are kept: whether they are what they were, though their numbers change."""

    __slots__ = ("_guards", "_sizes", "_tensors")

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # One that comes twice is looked at once: guards take it for another.
        self._tensors = list({id(t): t for t in tensors}.values())
        self._sizes, self._guards = self._seen(), None
        if hasattr(guards, "TensorGuards") and all(type(t) in _PLAIN for t in self._tensors):
            self._guards = guards.TensorGuards(
                *self._tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
            )

    def hold(self) -> bool:
        if self._guards is not None and self._guards.check(*self._tensors):
            return True
        return self._seen() == self._sizes

    def _seen(self) -> list[tuple[Any, ...]]:
        return [(t.shape, t.dtype, t.device) for t in self._tensors]


class Known:
    """What holds of every call whose tensors have certain forms."""

    __slots__ = ("checked", "direct", "guards", "plans")

    def __init__(self, tensors: list[Tensor]) -> None:
        self.guards = guards.TensorGuards(
            *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
        )
        self.checked = False
        """Whether sizes, dtypes, devices and names passed the public op's checks."""
        self.direct = of_memory(tensors)
        """Whether a kernel may read all of them, and nobody asks for a gradient."""
        self.plans: dict[Hashable, Any] = {}
        """What a backend made of them, by what else it depends on."""

    def keep(self, key: Hashable, plan: Any) -> None:
        """Among :attr:`plans`, of which there are never many."""
        if len(self.plans) >= _MOST_PLANS:
            self.plans = {}
        self.plans[key] = plan


_known: dict[Hashable, Known] = {}
_lock = threading.Lock()
"""Of additions: the oldest one is looked for."""
_MOST = 256
_MOST_PLANS = 64
_PLAIN = (Tensor, torch.nn.Parameter)


def known(x: Tensor, plugin: PluginWeights, ffn: FeedForward) -> Known | None:
    """What is known of calls with arguments that look like these; None where that may not be asked:
    while a trace is made, and of tensors that are more than strided memory."""
    if not hasattr(guards, "TensorGuards") or torch.compiler.is_compiling() or tracing():
        return None
    w_in, w_out, w_gate, b_in, b_out, b_gate, *_ = ffn
    scale, shift = ffn.norm_weight, ffn.norm_bias
    optional = w_gate, b_in, b_out, b_gate, scale, shift
    tensors = [x, *plugin[:6], w_in, w_out, *[t for t in optional if t is not None]]
    ids = list(map(id, tensors))
    # One that comes twice is looked at once: guards take it for another.
    again = () if len(set(ids)) == len(ids) else tuple(map(ids.index, ids))
    if again:
        tensors = [t for place, t in enumerate(tensors) if again[place] == place]
    try:
        key = (
            x.shape, x.dtype, x.device, x.stride(), x.requires_grad, plugin.merge_bias.shape,
            plugin.w1.shape, plugin.w1.requires_grad, plugin.activation, w_in.shape, w_in.dtype,
            w_gate is None, b_in is None, b_out is None, b_gate is None, scale is None,
            shift is None, ffn.activation, ffn.norm, ffn.eps, ffn.post_norm, ffn.residual,
            ffn.module is None, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), again,
        )  # fmt: skip
        found = _known.get(key)
        if found is not None and found.guards.check(*tensors):
            return found
        if not all(type(t) in _PLAIN and t.layout is torch.strided for t in tensors):
            return None
        found = Known(tensors)
    except (AttributeError, TypeError, RuntimeError):
        return None  # the checks say what came in a tensor's or a name's place
    with _lock:
        while len(_known) >= _MOST and key not in _known:
            _known.pop(next(iter(_known)))
        _known[key] = found
    return found
