"""A sublayer's norm in few passes over memory, for inference on the CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import extension
from . import prepack
from .arguments import Norm, flat
from .cpu_arguments import dtype_code, norm_kernel, wide_norm
from .feed_forward import normalize
from .transforms import is_plain


def normalize_fast(x: Tensor, norm: Norm) -> Tensor:
    """:func:`~.feed_forward.normalize` of ``x [..., d]``: in fp32 inside, as there.

    Where a gradient is asked for, on other devices and in traces it is that function.
    """
    weight = norm.weight
    given = [t for t in (weight, norm.bias) if t is not None]
    same = weight is not None and all(t.dtype == x.dtype for t in given)
    fits = x.is_cpu and x.dtype != torch.float64 and same and x.numel() > 0
    if torch.is_grad_enabled() or not fits or not is_plain(x):
        return normalize(x, norm.name, norm.weight, norm.bias, norm.eps)
    assert weight is not None
    if extension.load() is not None and in_one_pass(norm, x.dtype):
        return _in_one_pass(x, norm)
    if norm.name == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, norm.bias, norm.eps)
    if norm.name != "rms" or norm.bias is not None:
        return normalize(x, norm.name, norm.weight, norm.bias, norm.eps)
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(norm.eps).rsqrt_()
    if x.dtype == torch.float32:
        return (wide * scale).mul_(weight)
    return wide.mul_(scale).mul_(weight.float()).to(x.dtype)  # one array of fp32, rounded once


def rms_of_few(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """The norm of the root mean square of so few vectors ``x [..., d]`` that calls are what counts:
    one call. None where it is not for kernels, which the caller has asked about modes and traces.
    """
    if torch.is_grad_enabled() or type(x) is not Tensor or not (x.is_cpu and x.is_contiguous()):
        return None
    dtype, d, kernels = x.dtype, x.shape[-1], extension.load()
    plain = type(weight) is torch.nn.Parameter and weight.dtype == dtype and weight.is_cpu
    if dtype not in _FEW or kernels is None or not plain or weight.shape != (d,):
        return None
    wide = weight.detach().float() if dtype != torch.float32 else weight
    if not wide.is_contiguous():
        return None
    y = torch.empty_like(x)
    kernels.NormRows(
        isa=prepack.instruction_set(),
        dtype=dtype_code(dtype),
        threads=1,
        rows=x.numel() // d,
        d=d,
        x=x.data_ptr(),
        x_stride=d,
        norm=_rms(wide.data_ptr(), eps),
        y=y.data_ptr(),
    ).run()
    return y


_FEW = (torch.float32, torch.bfloat16, torch.float16)


@functools.lru_cache(1024)
def _rms(weight: int, eps: float) -> Any:
    """An address and a number, as the kernels read them."""
    kind = extension.enum_value("cpu", "norms", "rms")
    return extension.load().Norm(kind=kind, weight=weight, bias=0, eps=eps, folded=False)


def in_one_pass(norm: Norm, dtype: torch.dtype) -> bool:
    """Whether this package's kernel makes it. PyTorch's own sums 16-bit rows in fp32 too, and is
    the faster one in fp32."""
    if norm.weight is None or norm.name == "none":
        return False
    return norm.name != "layer" or dtype != torch.float32


def _in_one_pass(x: Tensor, norm: Norm) -> Tensor:
    rows, norm = flat(x), wide_norm(norm, x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype)
    extension.load().NormRows(
        isa=prepack.instruction_set(),
        dtype=dtype_code(x.dtype),
        threads=torch.get_num_threads(),
        rows=rows.shape[0],
        d=rows.shape[1],
        x=rows.data_ptr(),
        x_stride=rows.stride(0),
        norm=norm_kernel(norm),
        y=y.data_ptr(),
    ).run()
    return y
