"""Checks at the public edge: an error names the argument, what came, what was expected."""

from __future__ import annotations

import operator

import torch
from torch import Tensor


def ratio(value: object, name: str = "ratio", least: int = 1) -> int:
    """An integer compression ratio of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, float) and value.is_integer():
            return ratio(int(value), name, least)
        if hasattr(value, "__index__") and not isinstance(value, (bool, Tensor)):
            return ratio(operator.index(value), name, least)  # NumPy's integers
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value


def choice(value: str, allowed: tuple[str, ...], name: str) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


def shape(tensor: Tensor, expected: tuple[int, ...], name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(tensor.shape)}")


def same_device(tensor: Tensor, x: Tensor, name: str, x_name: str = "x") -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x_name}'s device {x.device}, got {tensor.device}")


def readable(tensor: Tensor) -> bool:
    """Whether looking at values costs no synchronisation and is no graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


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
