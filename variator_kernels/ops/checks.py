"""Checks of the public ops' arguments; each raises ValueError (TypeError where no tensor came)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..checks import choice
from .feed_forward import ADAPTER_ACTIVATIONS, FFN_ACTIVATIONS, NORMS, FeedForward, PluginWeights
from .transforms import has_values


def shape(tensor: Tensor, expected: tuple[int, ...], name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(tensor.shape)}")


def same_device(tensor: Tensor, x: Tensor, name: str, x_name: str = "x") -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x_name}'s device {x.device}, got {tensor.device}")


def readable(tensor: Tensor) -> bool:
    """Whether there are values, and looking at them costs no synchronisation and no graph break."""
    return tensor.device.type == "cpu" and has_values(tensor)


def mask_values(mask: Tensor, name: str) -> None:
    """A floating mask holds 1 and 0; an additive one (0 and -inf) would mean the opposite."""
    if mask.is_floating_point() and readable(mask) and bool((mask < 0).any()):
        raise ValueError(
            f"{name} must be nonzero for a real token and 0 for padding, got negative values "
            "(an additive mask?)"
        )


def floating(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating point tensor, got {tensor.dtype}")


def parameter(tensor: Tensor, expected: tuple[int, ...], x: Tensor, name: str) -> None:
    """A floating tensor of a shape, on x's device."""
    # One expression is all that a good one costs: every call of an op looks at a dozen.
    if not (
        isinstance(tensor, Tensor)
        and tensor.shape == expected
        and tensor.device == x.device
        and tensor.is_floating_point()
    ):
        shape(tensor, expected, name)
        same_device(tensor, x, name)
        floating(tensor, name)


def hidden(x: Tensor, cu_seqlens: Tensor | None, name: str = "x") -> None:
    """A floating ``[B, n, d]``, or ``[T, d]`` with ``cu_seqlens``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    dims = 3 if cu_seqlens is None else 2
    if x.dim() != dims:
        form = "[batch, length, hidden]" if dims == 3 else "[tokens, hidden] (cu_seqlens is given)"
        raise ValueError(f"{name} must have shape {form}, got {list(x.shape)}")
    floating(x, name)


def token_mask(mask: Tensor | None, cu_seqlens: Tensor | None, x: Tensor) -> None:
    """``mask [B, n]`` (nonzero: a real token) and ``cu_seqlens [sequences + 1]``, never both."""
    if mask is not None and cu_seqlens is not None:
        raise ValueError("mask and cu_seqlens exclude each other: packed input has no padding")
    if mask is not None:
        shape(mask, tuple(x.shape[:2]), "mask")
        same_device(mask, x, "mask")
        mask_values(mask, "mask")
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            got = list(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens)
            raise ValueError(f"cu_seqlens must be a 1-d tensor of at least one offset, got {got}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        same_device(cu_seqlens, x, "cu_seqlens")
        if readable(cu_seqlens):
            offsets(cu_seqlens, x.shape[0])


def kept(first: int, last: int, keep: Tensor | None, x: Tensor) -> None:
    """How many tokens stay whole at each end of a row, and a mask ``[B, n]`` or ``[T]`` of more."""
    for number, name in ((first, "keep_first"), (last, "keep_last")):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an integer, got {number!r}")
        if not 0 <= number < 2**31:
            raise ValueError(f"{name} must be >= 0 and < 2^31, got {number}")
    if keep is not None:
        shape(keep, tuple(x.shape[:-1]), "keep")
        same_device(keep, x, "keep")
        mask_values(keep, "keep")


def offsets(cu_seqlens: Tensor, tokens: int) -> None:
    """Offsets never fall and stay within the tokens."""
    values = cu_seqlens.tolist()
    if values[0] < 0 or values[-1] > tokens or any(a > b for a, b in pairwise(values)):
        raise ValueError(
            f"cu_seqlens must rise from >= 0 to at most the number of tokens, {tokens}, "
            f"got {values}"
        )


def merge_parameters(weight: Tensor, bias: Tensor, x: Tensor) -> int:
    """W_c ``[k, k*d]`` and b_c ``[k]``; returns k."""
    if not isinstance(bias, Tensor) or bias.dim() != 1 or bias.shape[0] < 2:
        got = list(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"merge bias must have shape [ratio] with ratio >= 2, got {got}")
    k = bias.shape[0]
    parameter(weight, (k, k * x.shape[-1]), x, "merge weight")
    parameter(bias, (k,), x, "merge bias")
    return k


def adapter_parameters(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, x: Tensor
) -> int:
    """W_1 ``[r, 2d]``, b_1 ``[r]``, W_2 ``[d, r]``, b_2 ``[d]``; returns r."""
    d = x.shape[-1]
    choice(activation, ADAPTER_ACTIVATIONS, "activation")
    if not isinstance(b1, Tensor) or b1.dim() != 1 or b1.shape[0] < 1:
        raise ValueError("b1 must have shape [bottleneck] with bottleneck >= 1")
    r = b1.shape[0]
    parameter(w1, (r, 2 * d), x, "w1")
    parameter(b1, (r,), x, "b1")
    parameter(w2, (d, r), x, "w2")
    parameter(b2, (d,), x, "b2")
    return r


def plugin(weights: PluginWeights, x: Tensor) -> None:
    """All of a plugin's parameters."""
    merge_parameters(weights.merge_weight, weights.merge_bias, x)
    adapter_parameters(weights.w1, weights.b1, weights.w2, weights.b2, weights.activation, x)


def feed_forward(ffn: FeedForward, x: Tensor) -> None:
    """Every tensor of the sublayer: shape, device, a floating dtype."""
    d = x.shape[-1]
    choice(ffn.norm, NORMS, "norm")
    expected: dict[str, tuple[int, ...]] = {"norm_weight": (d,), "norm_bias": (d,)}
    if ffn.module is None:
        choice(ffn.activation, FFN_ACTIVATIONS, "ffn activation")
        f = ffn.w_in.shape[0]
        expected |= {"w_in": (f, d), "w_out": (d, f), "w_gate": (f, d)}
        expected |= {"b_in": (f,), "b_out": (d,), "b_gate": (f,)}
    for name, size in expected.items():
        tensor = getattr(ffn, name)
        if tensor is not None:
            parameter(tensor, size, x, name)


def compressed_ffn(
    x: Tensor,
    plugin_weights: PluginWeights,
    ffn: FeedForward,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Everything that the sublayer is given."""
    hidden(x, cu_seqlens)
    token_mask(mask, cu_seqlens, x)
    plugin(plugin_weights, x)
    feed_forward(ffn, x)
