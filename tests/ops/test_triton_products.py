"""The Triton product by itself: activations, gate, biases, descriptors, persistent grid, NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ops.cases import GPU, TRITON, assert_close, moved
from variator_kernels.ops.feed_forward import activate

if not TRITON.usable:
    pytest.skip(f"no Triton kernels: {TRITON.detail}", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor

from variator_kernels.ops.compressed_ffn.triton_products import descriptor, linear, look
from variator_kernels.triton_kernels import launch

pytestmark = [pytest.mark.gpu] if GPU else []

ROW = {"products": "triton", "bm": 16, "bn": 32, "bk": 16, "group": 2, "persistent": 0,
       "tma": False, "warps": 4, "stages": 1}  # fmt: skip


def settings(monkeypatch, **changes):
    monkeypatch.setattr(launch, "settings", lambda kernel, **case: {**ROW, **changes})


def operands(rows, inner, columns, dtype):
    made = [torch.randn(rows, inner), torch.randn(columns, inner) / inner**0.5]
    made += [torch.randn(columns), torch.randn(columns, inner) / inner**0.5, torch.randn(columns)]
    return moved(tuple(t.to(dtype) for t in made), "triton")


def plain(a, w, b, activation, w_gate=None, b_gate=None):
    out = F.linear(a, w, b)
    out = out if activation == "none" else activate(out, activation)
    return out if w_gate is None else out * F.linear(a, w_gate, b_gate)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("form", [{}, {"tma": True}, {"persistent": 1}])
def test_against_pytorch(monkeypatch, gated, activation, form):
    settings(monkeypatch, **form)
    # Rows of 40 and 50 numbers in bf16: only the first can have a descriptor.
    for rows, inner, columns in ((35, 40, 56), (33, 50, 50)):
        a, w, b, *gate = operands(rows, inner, columns, torch.bfloat16)
        arguments = (a, w, b, activation, *(gate if gated else ()))
        truth = plain(*(t.double() if isinstance(t, torch.Tensor) else t for t in arguments))
        out = linear("linear_in", *arguments, case={})
        assert_close(out, plain(*arguments), truth, f"{activation} {inner}")


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_nan_stays_in_its_row(monkeypatch, activation):
    settings(monkeypatch)
    a, w, b, *_ = operands(20, 40, 56, torch.float32)
    a[3, 7] = float("nan")
    out = linear("linear_in", a, w, b, activation, case={})
    assert out[3].isnan().all() and out[:3].isfinite().all() and out[4:].isfinite().all()


def test_no_rows(monkeypatch):
    settings(monkeypatch, tma=True)
    a, w, b, *_ = operands(0, 40, 56, torch.float32)
    assert linear("linear_in", a, w, b, "relu", case={}).shape == (0, 56)


def test_descriptors_are_those_of_triton():
    """They are made without Triton's checks, and must have every field that it knows."""
    for matrix in moved((torch.zeros(33, 40).bfloat16(), torch.zeros(8, 64)[:, :32]), "triton"):
        ours, theirs = (
            dict(vars(made))
            for made in (
                descriptor(matrix, look(matrix.shape, matrix.stride(), (16, 32))),
                TensorDescriptor.from_tensor(matrix, [16, 32]),
            )
        )
        assert ours.pop("base") is theirs.pop("base") is matrix
        assert ours == theirs
