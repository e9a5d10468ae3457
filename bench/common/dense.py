"""The strongest dense sublayer there is: weights packed once by oneDNN, everything fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5LayerFF

from variator_kernels.models.describe import describe

from .compiling import Unavailable, compiled
from .timing import median_of

# Post-ops of oneDNN by activation: name, scalars, algorithm.
POST_OPS: dict[str, tuple[str, list, str]] = {
    "relu": ("relu", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
}
BLOCKS = (0, 256, 512, 1024)  # rows; 0: all at once
FINALISTS = 3
Forward = Callable[[Tensor], Tensor]


@dataclass
class DensePacked:
    """One dense sublayer on packed weights; ``rows`` a block and how norm and residual are done."""

    layer: T5LayerFF
    norm: Forward
    rows: int
    fused_add: bool

    def __post_init__(self) -> None:
        inner = self.layer.DenseReluDense
        first = [inner.wi] if hasattr(inner, "wi") else [inner.wi_0, inner.wi_1]
        pack = torch.ops.mkldnn._reorder_linear_weight
        self.w_in, *gate = (pack(linear.weight.detach()) for linear in first)
        self.w_gate = gate[0] if gate else None
        self.w_out = pack(inner.wo.weight.detach())
        self.post_op = POST_OPS[str(describe(self.layer).activation)]

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if not 0 < self.rows < flat.shape[0]:
            return self.block(flat).view_as(x)
        out = torch.empty_like(flat)
        for source, target in zip(flat.split(self.rows), out.split(self.rows), strict=True):
            target.copy_(self.block(source))
        return out.view_as(x)

    def block(self, x: Tensor) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        h = self.norm(x)
        inner = linear(h, self.w_in, None, *self.post_op)
        if self.w_gate is not None:
            inner = linear.binary(h, inner, self.w_gate, None, "mul")
        if self.fused_add:
            return linear.binary(inner, x, self.w_out, None, "add")
        return x + linear(inner, self.w_out, None, "none", [], "")


def variants(layer: T5LayerFF) -> dict[str, Forward]:
    """Every dense candidate by name; the frozen inductor graph of the sublayer is one of them."""
    if not torch.backends.mkldnn.is_available():
        raise Unavailable("this torch has no oneDNN")
    weight, eps = layer.layer_norm.weight.detach(), layer.layer_norm.variance_epsilon
    norms: dict[str, Forward] = {"rms_norm": lambda x: F.rms_norm(x, weight.shape, weight, eps)}
    found: dict[str, Forward] = {}
    try:
        norms["compiled norm"] = compiled(layer.layer_norm)
        found["frozen inductor graph"] = compiled(layer)
    except Unavailable:
        pass
    for name, norm in norms.items():
        for rows in BLOCKS:
            for fused in (False, True):
                size = f"{rows} rows a block" if rows else "one block"
                add = "fused add" if fused else "separate add"
                found[f"{name}, {size}, {add}"] = DensePacked(layer, norm, rows, fused)
    return found


def fastest(layer: T5LayerFF, x: Tensor) -> tuple[str, Forward]:
    """The fastest candidate on ``x``: one look at each, a longer one at the best."""
    total = x.numel() // x.shape[-1]
    try:
        candidates = {
            name: call
            for name, call in variants(layer).items()
            if not isinstance(call, DensePacked) or call.rows < total
        }
        first = {name: median_of(partial(call, x), 2) for name, call in candidates.items()}
    except RuntimeError as error:
        raise Unavailable(f"oneDNN: {str(error).splitlines()[0]}") from error
    best = sorted(first, key=first.__getitem__)[:FINALISTS]
    longer = {name: median_of(partial(candidates[name], x), 5) for name in best}
    name = min(longer, key=longer.__getitem__)
    return name, candidates[name]
