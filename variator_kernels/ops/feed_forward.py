"""What a feed-forward sublayer consists of: its norm, its products, its residual."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import NO_NORM, AdapterWeights, MergeWeights, Norm

FFN_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
ADAPTER_ACTIVATIONS = ("tanh", "identity")
"""φ of the adapter."""
NORMS = ("none", "rms", "layer")


class FeedForward(NamedTuple):
    """The frozen sublayer around which a plugin works.

    ``FFN(g) = w_out · (act(w_in · g + b_in) [* (w_gate · g + b_gate)]) + b_out``; the gate is
    there only if ``w_gate`` is.  ``norm`` is what the sublayer applies to its input before the
    products (pre-norm), or to the sum ``x + o`` after them if ``post_norm`` is set.

    Shapes: ``w_in``, ``w_gate`` ``[f, d]``; ``w_out`` ``[d, f]``; biases ``[f]`` or ``[d]``;
    ``norm_weight``, ``norm_bias`` ``[d]``.
    """

    w_in: Tensor
    w_out: Tensor
    w_gate: Tensor | None = None
    b_in: Tensor | None = None
    b_out: Tensor | None = None
    b_gate: Tensor | None = None
    activation: str = "relu"
    norm: str = "none"
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-6
    post_norm: bool = False
    residual: bool = True
    """Whether the sublayer adds its input. Without, it gives ``o`` alone, and 0 for padding."""
    dropout_inner: float = 0.0
    """Dropout probability on the inner activations; 0 outside training."""
    dropout_outer: float = 0.0
    """Dropout probability on ``FFN(g)``; 0 outside training."""
    pack: bool = True
    """Whether the CPU may keep packed copies of the weights from call to call."""
    precision: str | None = None
    """In which the CPU multiplies where no gradient is asked for; None: in the weights' dtype."""
    scales: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    """Of weights in int8: what 1 of ``w_in``, ``w_out``, ``w_gate`` stands for, ``[1]`` or
    ``[out]``."""
    stored: FeedForward | None = None
    """The same sublayer with weights that came in int8, which runs in the place of ``module`` where
    :func:`~variator_kernels.ops.int8_linear.stored_here` says so. Its precision is ``"int8"`` if
    vectors are rounded too."""
    module: Callable[[Tensor], Tensor] | None = None
    """Runs ``FFN`` in place of the products, where the weights alone do not tell what it does
    (replaced linear layers, hooks)."""

    @property
    def any_norm(self) -> Norm:
        """The sublayer's norm, in front or behind."""
        return Norm(self.norm, self.norm_weight, self.norm_bias, self.eps)

    @property
    def pre_norm(self) -> Norm:
        """The norm in front of the merge, if there is one."""
        return NO_NORM if self.post_norm or self.norm == "none" else self.any_norm


class PluginWeights(NamedTuple):
    """The parameters of one plugin: ratio k, bottleneck r, hidden size d.

    ``merge_weight [k, k*d]``, ``merge_bias [k]`` (W_c, b_c); ``w1 [r, 2*d]``, ``b1 [r]``,
    ``w2 [d, r]``, ``b2 [d]`` (the adapter); ``activation`` is φ, ``"tanh"`` or ``"identity"``.
    """

    merge_weight: Tensor
    merge_bias: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    activation: str = "tanh"

    @property
    def ratio(self) -> int:
        return self.merge_bias.shape[0]

    @property
    def merge(self) -> MergeWeights:
        """W_c, b_c, and W_1h to be multiplied with on the way."""
        w1h = self.w1[:, self.w1.shape[1] // 2 :]
        return MergeWeights(self.merge_weight, self.merge_bias, w1h)

    @property
    def adapter(self) -> AdapterWeights:
        """W_1u and the rest of the adapter."""
        w1u = self.w1[:, : self.w1.shape[1] // 2]
        return AdapterWeights(w1u, self.b1, self.w2, self.b2, self.activation)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where ``x`` is; the meta device has none."""
    return not x.is_meta and torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


def activate(x: Tensor, activation: str) -> Tensor:
    """The FFN's inner activation by name."""
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def fixed(size: Any) -> int:
    """``size`` as a number for operations that take nothing else: while traced, it is a tensor."""
    if not isinstance(size, Tensor):
        return size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return int(size)


def normalize(
    x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The sublayer's norm of ``x [..., d]``, computed in fp32 or wider; in the weight's dtype."""
    if norm == "none":
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    if norm == "layer":
        scale, shift = (None if p is None else p.to(wide.dtype) for p in (weight, bias))
        out = F.layer_norm(wide, (fixed(wide.shape[-1]),), scale, shift, eps)
        return out.to(x.dtype if weight is None else weight.dtype)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = weight * wide.to(weight.dtype)
    else:
        out = wide.to(x.dtype)
    return out if bias is None else out + bias


def products(g: Tensor, ffn: FeedForward, linear: Callable[..., Tensor] = F.linear) -> Tensor:
    """``Dropout(FFN(g))`` in PyTorch: ``g [..., d]`` to ``[..., d]``; ``linear`` multiplies.

    As in ``transformers``, inner activations take ``w_out``'s dtype: T5 in fp16 keeps it fp32.
    """
    if ffn.module is not None:
        u = ffn.module(g)
        return F.dropout(u, ffn.dropout_outer) if ffn.dropout_outer > 0 else u
    autocast = autocasts(g)
    g = g if autocast else g.to(ffn.w_in.dtype)
    inner = activate(linear(g, ffn.w_in, ffn.b_in), ffn.activation)
    if ffn.w_gate is not None:
        inner = inner * linear(g, ffn.w_gate, ffn.b_gate)
    inner = F.dropout(inner, ffn.dropout_inner) if ffn.dropout_inner > 0 else inner
    inner = inner if autocast else inner.to(ffn.w_out.dtype)
    u = linear(inner, ffn.w_out, ffn.b_out)
    return F.dropout(u, ffn.dropout_outer) if ffn.dropout_outer > 0 else u
