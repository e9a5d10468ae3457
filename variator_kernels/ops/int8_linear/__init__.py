"""int8_linear: ``F.linear`` with int8 weights, a scale an output channel, and rows that are rounded
on the way, each with a scale of its own; sums in int32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..transforms import exporting, tracing, transformed
from .kernels import describe, describe_stored, kernel
from .stored import StoredWeight, bears

__all__ = [
    "PRECISIONS",
    "StoredWeight",
    "bears",
    "describe",
    "describe_stored",
    "here",
    "kernel",
    "own_precision",
    "stored_here",
]

PRECISIONS = ("int8",)
"""In which frozen products can run, beside the model's own dtype (None)."""


class _Local(threading.local):
    # Set here and not as a class attribute: the compiler guards on the instance's own dict.
    def __init__(self) -> None:
        self.own = False


_local = _Local()


@contextmanager
def own_precision() -> Iterator[None]:
    """In this thread, products run in the model's own dtype: training and calibration compare with
    what the model itself gives."""
    outer = _local.own
    _local.own = True
    try:
        yield
    finally:
        _local.own = outer


def here(precision: str | None, training: bool) -> str | None:
    """``precision`` where a product runs in it: in inference on the CPU, which is evaluation mode
    (``training`` is False) with gradients disabled, and in exported programs. Else None.

    Raises:
        ValueError: ONNX's exporter runs, which has no such product.
    """
    if precision is None:
        return None
    if (torch.compiler.is_compiling() or tracing()) and torch.onnx.is_in_onnx_export():
        raise ValueError(
            f"precision={precision!r} cannot be exported to ONNX, which has no such product: patch "
            "the model with precision=None"
        )
    if training or _local.own or (torch.is_grad_enabled() and not exporting()):
        return None
    return precision if _runs_here() and not transformed() else None


def stored_here(*tensors: Tensor) -> bool:
    """Whether weights that came in int8 multiply here as :class:`StoredWeight`, with ``tensors``,
    and not by their model's own modules: on the CPU with gradients disabled, neither traced nor
    transformed nor under autocast, outside of training and calibration."""
    return not (
        torch.is_grad_enabled()
        or _local.own
        or torch.compiler.is_compiling()
        or tracing()
        or transformed()
        or torch.is_autocast_enabled("cpu")
    ) and all(tensor.is_cpu for tensor in tensors)


@torch.compiler.assume_constant_result
def _runs_here() -> bool:
    return kernel() is not None
