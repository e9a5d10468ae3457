"""Inputs, weights and the comparison with the float64 reference that the op tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from variator_kernels import backends, environment, extension
from variator_kernels.ops.feed_forward import FeedForward, PluginWeights

CPU = extension.load()
# Where one is asked for (`make test-weaker`), it alone: the others are run without it.
ASKED = environment.choice("VARIATOR_CPU_ISA", environment.INSTRUCTION_SETS)
INT8_ISAS = [ASKED] if CPU and ASKED else CPU.available_isas() if CPU else []
# Beside int8 the kernels of avx512_vnni are those of avx512.
ISAS = [isa for isa in INT8_ISAS if isa != "avx512_vnni" or isa == ASKED]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RATIOS = [2, 3, 4, 5, 8, 16, 32]
needs_cpu = pytest.mark.skipif(CPU is None, reason=f"no CPU kernels: {extension.why_missing()}")

# Triton's kernels run on a GPU where there is one, else interpreted (tests/interpreter.py).
GPU = torch.cuda.is_available()
TRITON = next(status for status in backends.status() if status.name == "triton")
on_triton = pytest.param(
    "triton",
    marks=[
        pytest.mark.skipif(not TRITON.usable, reason=f"no Triton kernels: {TRITON.detail}"),
        *([pytest.mark.gpu] if GPU else []),
    ],
)

# The CUDA kernels on a GPU, else emulated (tests/emulation.py).
CUDA = next(status for status in backends.status() if status.name == "cuda")
on_cuda = pytest.param(
    "cuda",
    marks=[
        pytest.mark.skipif(not CUDA.usable, reason=f"no CUDA kernels: {CUDA.detail}"),
        *([pytest.mark.gpu] if GPU else []),
    ],
)

# (rows, tokens, hidden size): one token, fewer than k, ragged tail, whole groups, no row, no
# token, a hidden size below, at and beside a vector's width.
SHAPES = [
    (2, 1, 24),
    (1, 7, 16),
    (3, 37, 50),
    (2, 64, 32),
    (0, 5, 24),
    (2, 0, 24),
    (1, 130, 7),
    (2, 70, 193),
]
# Enough for the interpreter, which takes tenths of a second a call; of them three in 16 bits.
INTERPRETED_SHAPES = [(2, 1, 24), (1, 7, 16), (3, 37, 50), (0, 5, 24), (2, 0, 24), (1, 21, 96)]
MASKS = ["none", "right", "left", "holes", "empty row"]


def masked(kind: str, rows: int, n: int) -> Tensor | None:
    """A token mask ``[rows, n]`` of a kind, a different length a row."""
    if kind == "none":
        return None
    lengths = torch.tensor([max(n - 3 * i - n // 4, min(n, 1)) for i in range(rows)])
    position = torch.arange(n)
    mask = position < lengths[:, None]
    if kind == "left":
        mask = mask.flip(-1)
    elif kind == "holes":
        mask = mask & (torch.rand(rows, n) > 0.3)
        mask[:, n // 3 : n // 3 + 9] = False  # wider than a group of 8
    elif kind == "empty row" and rows:
        mask[0] = False
    return mask


# How tokens stay whole: the first, some at both ends, any, all, and more than a row has.
KEPT = ["first", "ends", "any", "all", "more"]


def kept(kind: str, *shape: int) -> dict[str, Any]:
    """Options of the sublayer that keep tokens of ``[rows, n]``, or varlen ``[n]``, whole."""
    n = shape[-1]
    if kind == "any":
        return {"keep_first": 1, "keep": torch.rand(shape) < 0.2}
    first, last = {"first": (1, 0), "ends": (2, 3), "all": (n, 0), "more": (n // 2, n)}[kind]
    return {"keep_first": first, "keep_last": last}


def plugin(d: int, k: int, r: int, dtype: torch.dtype, activation: str = "tanh") -> PluginWeights:
    shapes = [(k, k * d), (k,), (r, 2 * d), (r,), (d, r), (d,)]
    scales = [(k * d) ** -0.5, 0.5, (2 * d) ** -0.5, 0.1, r**-0.5, 0.1]
    made = [(torch.randn(s) * scale).to(dtype) for s, scale in zip(shapes, scales, strict=True)]
    return PluginWeights(*made, activation=activation)


def feed_forward(d: int, f: int, dtype: torch.dtype, kind: str) -> FeedForward:
    """``"t5"`` (ReLU), ``"v1.1"`` (gated GELU) or ``"bert"`` (post-norm, biases)."""

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)

    norm_weight = (1 + 0.1 * torch.randn(d)).to(dtype)
    if kind == "t5":
        return FeedForward(random(f, d), random(d, f), norm="rms", norm_weight=norm_weight)
    if kind == "v1.1":
        return FeedForward(
            random(f, d),
            random(d, f),
            w_gate=random(f, d),
            activation="gelu_tanh",
            norm="rms",
            norm_weight=norm_weight,
        )
    return FeedForward(
        random(f, d),
        random(d, f),
        b_in=random(1, f)[0],
        b_out=random(1, d)[0],
        activation="gelu",
        norm="layer",
        norm_weight=norm_weight,
        norm_bias=random(1, d)[0],
        eps=1e-12,
        post_norm=True,
    )


def cast(values, dtype: torch.dtype):
    """A NamedTuple of tensors and settings with every tensor in ``dtype``."""
    return type(values)(*[v.to(dtype) if isinstance(v, Tensor) else v for v in values])


def assert_close(out: Tensor, plain: Tensor, truth: Tensor, what: str = "output") -> None:
    """The project's rule: at most twice the error of plain PyTorch in the same dtype + 1e-6."""
    assert out.shape == truth.shape, f"{what}: shape {list(out.shape)}, not {list(truth.shape)}"
    if truth.numel() == 0:
        return
    assert not torch.isnan(out).any(), f"{what}: NaN, an element was not written"
    error = (out.double() - truth).abs().max().item()
    allowed = 2 * (plain.double() - truth).abs().max().item() + 1e-6
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def dtypes_of(kernels: str) -> list[torch.dtype]:
    """The dtypes a set of kernels knows."""
    return {"triton": DTYPES[:3], "cuda": DTYPES[1:3]}.get(kernels, DTYPES)


def skip_unknown(dtype: torch.dtype, kernels: str) -> None:
    if dtype not in dtypes_of(kernels):
        pytest.skip(f"the {kernels} kernels have no {dtype}")


def interpreted(kernels: str) -> bool:
    return kernels == "triton" and not GPU


def skip_interpreted(kernels: str, when: bool, what: str) -> None:
    """Leaves out ``when`` other cases test the same, and this one costs the interpreter seconds."""
    if when and interpreted(kernels):
        pytest.skip(f"interpreted, others are enough: {what}")


def shapes_of(kernels: str, dtype: torch.dtype) -> list[tuple[int, int, int]]:
    if not interpreted(kernels):
        return [(rows, n, hidden_of(kernels, d)) for rows, n, d in SHAPES]
    return INTERPRETED_SHAPES if dtype == torch.float32 else INTERPRETED_SHAPES[:3]


def hidden_of(kernels: str, d: int) -> int:
    """A hidden size that the kernels know, from ``d`` on."""
    return -(-d // 8) * 8 if kernels == "cuda" else d


def moved(values, kernels: str):
    """Tensors, and NamedTuples of them, to where ``kernels`` run."""
    device = "cuda" if kernels in ("triton", "cuda") and GPU else "cpu"
    if isinstance(values, Tensor):
        return values.to(device)
    if isinstance(values, tuple):
        made = [moved(v, kernels) for v in values]
        return type(values)(*made) if hasattr(values, "_fields") else tuple(made)
    return values


@pytest.fixture
def kernels(request):
    """Runs a test on one set of kernels (indirect parameter) and gives its backend's name.

    A set is an instruction set of the CPU's kernels, ``"triton"`` or ``"cuda"``.
    """
    if request.param in ("triton", "cuda"):
        yield request.param
        return
    before = CPU.active_isa()
    CPU.set_isa(request.param)
    yield "cpu"
    CPU.set_isa(before)


every_kernel = pytest.mark.parametrize("kernels", [*ISAS, on_triton, on_cuda], indirect=True)
kernel_backends = [pytest.param("cpu", marks=needs_cpu), on_triton]
every_kernel_backend = pytest.mark.parametrize("backend", kernel_backends)
every_backend = pytest.mark.parametrize("backend", ["reference", *kernel_backends])
