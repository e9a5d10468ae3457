"""The dense sublayer: in plain PyTorch of any dtype, and the strongest there is on a CPU.

The latter has its weights packed once by oneDNN and everything fused.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variator_kernels import FeedForward

from .. import internals
from ..harness.clock import median_of
from ..harness.compiling import Unavailable, compiled

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


INNER: dict[str, Forward] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def library_norm(ffn: FeedForward, x: Tensor) -> Tensor:
    """The sublayer's norm by PyTorch's own kernel."""
    weight: Any = ffn.norm_weight
    if ffn.norm == "none":
        return x
    if ffn.norm == "layer":
        return F.layer_norm(x, weight.shape, weight, ffn.norm_bias, ffn.eps)
    return F.rms_norm(x, weight.shape, weight, ffn.eps)


def plain(ffn: FeedForward, x: Tensor) -> Tensor:
    """The sublayer in x's dtype throughout: Hugging Face's norms are in fp32 even in float64."""
    h = x if ffn.post_norm else library_norm(ffn, x)
    inner = INNER[ffn.activation](F.linear(h, ffn.w_in, ffn.b_in))
    if ffn.w_gate is not None:
        inner = inner * F.linear(h, ffn.w_gate, ffn.b_gate)
    out = F.linear(inner, ffn.w_out, ffn.b_out)
    out = x + out if ffn.residual else out
    return library_norm(ffn, out) if ffn.post_norm else out


@dataclass
class DensePacked:
    """One dense sublayer on packed weights; ``rows`` a block and how norm and residual are done."""

    ffn: FeedForward
    norm: Forward
    rows: int
    fused_add: bool

    def __post_init__(self) -> None:
        ffn, pack = self.ffn, torch.ops.mkldnn._reorder_linear_weight
        self.w_in, self.w_out = pack(ffn.w_in.detach()), pack(ffn.w_out.detach())
        self.w_gate = None if ffn.w_gate is None else pack(ffn.w_gate.detach())
        self.post_op = POST_OPS[ffn.activation]

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if not 0 < self.rows < flat.shape[0]:
            return self.block(flat).view_as(x)
        out = torch.empty_like(flat)
        for source, target in zip(flat.split(self.rows), out.split(self.rows), strict=True):
            target.copy_(self.block(source))
        return out.view_as(x)

    def block(self, x: Tensor) -> Tensor:
        linear, ffn = torch.ops.mkldnn._linear_pointwise, self.ffn
        h = x if ffn.post_norm else self.norm(x)
        inner = linear(h, self.w_in, ffn.b_in, *self.post_op)
        if self.w_gate is not None:
            inner = linear.binary(h, inner, self.w_gate, ffn.b_gate, "mul")
        if self.fused_add:
            out = linear.binary(inner, x, self.w_out, ffn.b_out, "add")
        else:
            out = linear(inner, self.w_out, ffn.b_out, "none", [], "")
            out = x + out if ffn.residual else out
        return self.norm(out) if ffn.post_norm else out


def variants(layer: nn.Module, ffn: FeedForward) -> dict[str, Forward]:
    """Every dense candidate by name; the frozen inductor graph of the sublayer is one of them."""
    if not torch.backends.mkldnn.is_available():
        raise Unavailable("this torch has no oneDNN")
    norms: dict[str, Forward] = {"no norm": lambda x: x}
    if ffn.norm != "none":
        norms = {f"{ffn.norm}_norm": partial(library_norm, ffn)}
    found: dict[str, Forward] = {}
    try:
        if ffn.norm == "rms":
            norms["compiled norm"] = compiled(internals.norm_module(layer))
        found["frozen inductor graph"] = compiled(layer)
    except Unavailable:
        pass
    adds = (False, True) if ffn.residual else (False,)
    for (name, norm), rows, fused in itertools.product(norms.items(), BLOCKS, adds):
        size = f"{rows} rows a block" if rows else "one block"
        add = "fused add" if fused else "separate add"
        found[f"{name}, {size}, {add}"] = DensePacked(ffn, norm, rows, fused)
    return found


def fastest(layer: nn.Module, ffn: FeedForward, x: Tensor) -> tuple[str, Forward]:
    """The fastest candidate on ``x``: one look at each, a longer one at the best."""
    total = x.numel() // x.shape[-1]
    try:
        candidates = variants(layer, ffn)
        for name, call in list(candidates.items()):
            if isinstance(call, DensePacked) and call.rows >= total:
                del candidates[name]
        first = {name: median_of(partial(call, x), 2) for name, call in candidates.items()}
    except RuntimeError as error:
        raise Unavailable(f"oneDNN: {str(error).splitlines()[0]}") from error
    best = sorted(first, key=first.__getitem__)[:FINALISTS]
    longer = {name: median_of(partial(candidates[name], x), 5) for name in best}
    name = min(longer, key=longer.__getitem__)
    return name, candidates[name]
