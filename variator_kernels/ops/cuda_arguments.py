"""What every CUDA kernel is told the same way: target, groups, vectors, padded weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import extension
from .arguments import Norm, require
from .gpu_arguments import GpuGroups

DTYPES = (torch.bfloat16, torch.float16)
# The adapter's rows are multiplied in chunks of as many: W_1 and W_2 are padded with zeros.
BOTTLENECK_CHUNK = 64


def dtype_code(dtype: torch.dtype) -> int:
    """The kernels' number for a storage type."""
    if dtype not in DTYPES:
        require(False, f"the CUDA kernels take {[*DTYPES]}, got {dtype}")
    return code("dtypes", str(dtype).removeprefix("torch."))


def code(kind: str, name: str) -> int:
    """The kernels' number for a name of an enumeration."""
    return extension.enum_value("cuda", kind, name)


def check_sizes(d: int, ratio: int, bottleneck: int = 0) -> None:
    """What the kernels are made for; an error names the argument."""
    cuda = extension.load("cuda")
    require(d % 8 == 0, f"hidden size is {d}, the CUDA kernels take multiples of 8")
    require(ratio <= cuda.max_ratio, f"ratio is {ratio}, the CUDA kernels take at most 32")
    most = cuda.max_bottleneck
    require(bottleneck <= most, f"bottleneck is {bottleneck}, the CUDA kernels take at most {most}")


def target(x: Tensor) -> Any:
    """The device and stream that a kernel on ``x`` is launched on."""
    if x.device.type != "cuda":
        return extension.load("cuda").Target(0, 0)  # emulation
    return extension.load("cuda").Target(
        x.device.index, torch.cuda.current_stream(x.device).cuda_stream
    )


def multiprocessors(x: Tensor) -> int:
    return extension.load("cuda").multiprocessors(x.device.index or 0)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def groups_kernel(groups: GpuGroups) -> Any:
    """Groups as the kernels read them; they count tokens in 32 bits."""
    tokens = groups.n * (groups.total // max(groups.per_row, 1))
    require(tokens < 2**31, f"the input has {tokens} tokens, the CUDA kernels take less than 2^31")
    return extension.load("cuda").Groups(
        start=address(groups.start),
        span=address(groups.span),
        owned=address(groups.owned),
        mask=address(groups.mask),
        kept=address(groups.kept),
        n=groups.n,
        per_row=groups.per_row,
        count=groups.total,
        launched=groups.launched,
        k=groups.ratio,
    )


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def aligned_rows(matrix: Tensor) -> Tensor:
    """A matrix whose rows have unit stride and start at multiples of 16 bytes."""
    fits = matrix.stride(-1) == 1 and matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0
    return matrix if fits else aligned(matrix)


def _padded(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """With zeros behind; itself, where ``F.pad`` would copy, if none are missing."""
    return F.pad(tensor, sizes) if sizes[-1] > 0 else tensor


def as_vector(vector: Tensor, dtype: torch.dtype, size: int = 0) -> Tensor:
    """A bias in fp32 or the storage type ``dtype``, with zeros up to ``size``."""
    if vector.dtype not in (torch.float32, dtype):
        vector = vector.float()
    return aligned(_padded(vector, (0, size - vector.shape[0])))


def vector(tensor: Tensor | None) -> Any:
    """The result of :func:`as_vector` as the kernels read it."""
    wide = tensor is not None and tensor.dtype == torch.float32
    return extension.load("cuda").Vector(address(tensor), wide)


def norm_kernel(norm: Norm) -> Any:
    """The result of :func:`cuda_norm` as the kernels read it."""
    return extension.load("cuda").Norm(
        code("norms", norm.name), vector(norm.weight), vector(norm.bias), norm.eps
    )


def cuda_norm(norm: Norm, dtype: torch.dtype) -> Norm:
    """A norm with vectors that :func:`as_vector` made for storage ``dtype``."""
    weight, bias = (None if v is None else as_vector(v, dtype) for v in (norm.weight, norm.bias))
    return norm._replace(weight=weight, bias=bias)


def chunks(bottleneck: int) -> int:
    """The bottleneck, padded."""
    return -(-bottleneck // BOTTLENECK_CHUNK) * BOTTLENECK_CHUNK


def pad_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight [r, d]`` with rows of zeros up to :func:`chunks`."""
    missing = chunks(weight.shape[0]) - weight.shape[0]
    return aligned_rows(_padded(weight.to(dtype), (0, 0, 0, missing)))


def pad_columns(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight [d, r]``, contiguous, with columns of zeros up to :func:`chunks`."""
    missing = chunks(weight.shape[1]) - weight.shape[1]
    return aligned(_padded(weight.to(dtype), (0, missing)))
