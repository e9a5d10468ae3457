"""The sublayers and attentions that Triton's kernels are compiled for, as calls without memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench import internals
from variator_kernels import FeedForward, PluginWeights


class Model(NamedTuple):
    """What of a model's FFN sublayer decides how kernels are compiled."""

    d: int
    f: int
    activation: str
    norm: str
    gated: bool = False
    post_norm: bool = False


MODELS = {
    "t5-base": Model(768, 3072, "relu", "rms"),
    "t5-large": Model(1024, 4096, "relu", "rms"),
    "bert-base": Model(768, 3072, "gelu", "layer", post_norm=True),
    "llama-7b": Model(4096, 11008, "silu", "rms", gated=True),
}


def sublayer(
    model: Model, k: int, dtype: torch.dtype, form: str = "plain", backward: bool = True,
    size: tuple[int, int, int] = (32, 512, 64),
) -> Callable[[], None]:  # fmt: skip
    """Forward and backward of one sublayer on tensors without memory: every launch there is.

    ``size`` are rows, tokens a row, and the adapter's bottleneck.
    """
    (rows, n, r), d, f = size, model.d, model.f

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def run() -> None:
        plugin = PluginWeights(
            make(k, k * d), make(k), make(r, 2 * d), make(r), make(d, r), make(d)
        )
        ffn = FeedForward(
            make(f, d), make(d, f), w_gate=make(f, d) if model.gated else None,
            b_in=make(f) if model.post_norm else None, b_out=make(d) if model.post_norm else None,
            activation=model.activation, norm=model.norm, norm_weight=make(d),
            norm_bias=make(d) if model.norm == "layer" else None, post_norm=model.post_norm,
        )  # fmt: skip
        x, mask, offsets = make(rows, n, d), None, None
        if form in ("masked", "kept"):
            mask = make(rows, n, dtype=torch.bool)
        if form == "packed":
            x, offsets = x.view(-1, d), make(rows + 1, dtype=torch.int32)
        first = 1 if form == "kept" else 0
        forward, back = internals.triton_launches(x, plugin, ffn, mask, offsets, keep_first=first)
        y = forward()
        if backward:
            back(y)

    return run


class Attention(NamedTuple):
    """What of a model's attention over merged keys decides how kernels are compiled."""

    heads: int
    kv_heads: int
    d: int
    kind: str


# Over the keys of groups of 4: learned positions, T5's table in front of keys and values and around
# the sublayer, a decoder's bounds, and all there is at once at a head size beside a power of 2.
ATTENTIONS = {
    "bert-base": Attention(12, 12, 64, "bias"),
    "t5-base": Attention(12, 12, 64, "table"),
    "t5-base around": Attention(12, 12, 64, "means"),
    "llama-7b": Attention(32, 32, 128, "bounds"),
    "grouped queries": Attention(32, 8, 80, "everything"),
    "large heads": Attention(16, 16, 256, "means"),
}


def attention(
    model: Attention, dtype: torch.dtype, size: tuple[int, int, int] = (8, 512, 128)
) -> Callable[[], None]:
    """Forward and backward of attention, as :func:`sublayer`; ``size``: rows, queries, keys."""
    rows, n, count = size

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def run() -> None:
        wide, whole = torch.promote_types(dtype, torch.float32), torch.int64
        bias = first = last = relative = None
        if model.kind != "table":
            bias = make(rows, count, dtype=wide)
        if model.kind in ("bounds", "everything"):
            first, last = (make(rows, count, dtype=torch.int32) for _ in range(2))
        if model.kind in ("table", "means", "everything"):
            patterns = 1 if model.kind == "means" else 15
            of = torch.float64 if model.kind == "means" else whole
            relative = internals.DistanceBias(
                make(patterns, model.heads, 263, dtype=wide),
                make(rows, n, dtype=of),
                make(rows, count, dtype=of),
                None if model.kind == "means" else make(rows, count, dtype=whole),
                -131,
            )
        queries = make(rows, n, model.heads, model.d)
        keys, values = (make(rows, count, model.kv_heads, model.d) for _ in range(2))
        forward, back = internals.triton_attention(
            queries, keys, values, (bias, first, last), relative
        )
        back(forward())

    return run
