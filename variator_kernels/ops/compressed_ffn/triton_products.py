"""The FFN's products on a GPU: Triton's with fused activation, or cuBLAS's through PyTorch, as the
launch table says."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...triton_kernels import launch
from ...triton_kernels.linear import linear_kernel
from ..feed_forward import FeedForward, activate
from ..gpu_arguments import contiguous, unit_rows


class Linear(NamedTuple):
    """``act(a · wᵀ + bias) [* (a · w_gateᵀ + gate_bias)]`` of operands of one form."""

    activation: str
    shape: tuple[int, int]
    """Of the result."""
    plain: launch.Launch | None
    """None: the product is PyTorch's."""
    described: launch.Launch | None
    """Where every operand's strides suit the copy engine."""
    looks: tuple[dict[str, Any], ...]
    """What :func:`descriptor` is to know of a, w, w_gate and the result."""

    def __call__(
        self, a: Tensor, w: Tensor, bias: Tensor | None, w_gate: Tensor | None = None,
        gate_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``a [rows, in]`` has rows of unit stride."""
        if self.plain is None:
            out = F.linear(a, w, bias)
            out = out if self.activation == "none" else activate(out, self.activation)
            return out if w_gate is None else out * F.linear(a, w_gate, gate_bias)
        out = a.new_empty(self.shape)
        if 0 in self.shape:
            return out
        w, w_gate = unit_rows(w), None if w_gate is None else unit_rows(w_gate)
        vectors = contiguous(bias), contiguous(gate_bias)
        gate_place = 0 if w_gate is None else w_gate.data_ptr()
        places = a.data_ptr() | w.data_ptr() | gate_place | out.data_ptr()
        if self.described is None or places % 16 != 0:
            self.plain(a, w, w_gate, *vectors, out)
            return out
        of_a, of_w, of_gate, of_out = self.looks
        self.described(
            descriptor(a, of_a),
            descriptor(w, of_w),
            None if w_gate is None else descriptor(w_gate, of_gate),
            *vectors,
            descriptor(out, of_out),
        )
        return out


def planned(
    kernel: str, a: Tensor, w: Tensor, activation: str, w_gate: Tensor | None, case: dict[str, Any]
) -> Linear:
    """For ``a [rows, in]`` and weights ``[out, in]``, all of one dtype."""
    row = launch.settings(kernel, activation=activation, **case)
    shape = a.shape[0], w.shape[0]
    if row["products"] == "torch":
        return Linear(activation, shape, None, None, ())
    w, w_gate = unit_rows(w), None if w_gate is None else unit_rows(w_gate)
    bm, bn, bk = row["bm"], row["bn"], row["bk"]
    tiles = launch.cdiv(shape[0], bm) * launch.cdiv(shape[1], bn)
    programs = min(tiles, launch.processors(a) * row["persistent"] or tiles)
    gate_stride = 0 if w_gate is None else w_gate.stride(0)
    plain = launch.Launch(
        linear_kernel,
        (programs,),
        (*shape, a.shape[1], a.stride(0), w.stride(0), gate_stride),
        dict(
            BM=bm, BN=bn, BK=bk, GROUP=row["group"], ACTIVATION=activation,
            GATED=w_gate is not None, TMA=False, PERSISTENT=row["persistent"] > 0,
            PRECISION=launch.precision(a), **launch.options(row),
        ),
    )  # fmt: skip
    # The copy engine takes rows that start at multiples of 16 bytes.
    strides = a.stride(0), w.stride(0), gate_stride, w.shape[0]
    if not row["tma"] or any(stride * a.element_size() % 16 != 0 for stride in strides):
        return Linear(activation, shape, plain, None, ())
    gate = {} if w_gate is None else look(w_gate.shape, w_gate.stride(), (bn, bk))
    looks = (
        look(a.shape, a.stride(), (bm, bk)),
        look(w.shape, w.stride(), (bn, bk)),
        gate,
        look(shape, (shape[1], 1), (bm, bn)),
    )
    described = plain._replace(constants={**plain.constants, "TMA": True})
    return Linear(activation, shape, plain, described, looks)


def linear(
    kernel: str,
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    activation: str,
    w_gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    case: dict[str, Any],
) -> Tensor:
    """One product; all of one dtype, ``a [rows, in]`` with rows of unit stride."""
    return planned(kernel, a, w, activation, w_gate, case)(a, w, bias, w_gate, gate_bias)


@functools.cache
def _template(rows: int, columns: int) -> dict[str, Any]:
    return vars(TensorDescriptor.from_tensor(torch.empty(rows, columns), [rows, columns]))


def look(shape: Sequence[int], strides: Sequence[int], block: tuple[int, int]) -> dict[str, Any]:
    """All of a descriptor but its tensor."""
    return {**_template(*block), "shape": shape, "strides": strides}


def descriptor(matrix: Tensor, of: dict[str, Any]) -> TensorDescriptor:
    """``TensorDescriptor.from_tensor`` of a matrix that suits the copy engine and looks like
    ``of``, without its checks of that and of the block at every launch."""
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {**of, "base": matrix}
    return made


class Products(NamedTuple):
    """``FFN(g)`` of vectors and weights of one form."""

    inner: Linear
    outer: Linear

    def __call__(self, g: Tensor, ffn: FeedForward) -> Tensor:
        inner = self.inner(g, ffn.w_in, ffn.b_in, ffn.w_gate, ffn.b_gate)
        return self.outer(inner, ffn.w_out, ffn.b_out)


def planned_products(g: Tensor, ffn: FeedForward, k: int) -> Products | None:
    """What multiplies ``g [groups, d]``; None where PyTorch does, because dtypes differ."""
    if any(t.dtype != g.dtype for t in (ffn.w_in, ffn.w_out, ffn.w_gate) if t is not None):
        return None
    f, d = ffn.w_in.shape
    # Small tiles read their operands four times as often from L2: they pay only where three
    # quarters of the multiprocessors would idle otherwise.
    tiles = launch.cdiv(g.shape[0], 128) * launch.cdiv(f, 256)
    case = launch.case(g, d, k, 4 * tiles, f=f)
    kernel = "linear_in" if ffn.w_gate is None else "linear_gated"
    inner = planned(kernel, g, ffn.w_in, ffn.activation, ffn.w_gate, case)
    between = g.new_empty(g.shape[0], f)
    return Products(inner, planned("linear_out", between, ffn.w_out, "none", None, case))
