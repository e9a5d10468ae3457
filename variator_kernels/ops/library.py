"""The ``variator`` namespace of ops, and which module runs a backend's part of one."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .transforms import refuse_transforms


class _Library(torch.library.Library):
    """An op's autograd first looks for transforms that it knows nothing of."""

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", **settings: Any) -> None:
        kernel = fn
        if dispatch_key == "Autograd":

            def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
                refuse_transforms(arguments)
                return fn(keyset, *arguments)

        super().impl(op_name, kernel, dispatch_key, **settings)


LIBRARY = _Library("variator", "DEF")


def define(schema: str) -> None:
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and softmax: fp32, or fp64 for fp64 storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def backend_module(package: str | None, backend: str) -> ModuleType:
    """The file of an op's folder that implements ``backend``."""
    return importlib.import_module(f".{backend}", package)


def refuse_second_derivatives() -> None:
    """Called by each op's backward: differentiating it again would be silently wrong."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the kernels have no second derivatives (create_graph=True); use backend='reference'"
        )
