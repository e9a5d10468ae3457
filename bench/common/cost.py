"""The cost bound: dense over compressed multiply-adds."""

from __future__ import annotations

from torch import nn
from transformers import T5Config

from variator_kernels import flops


def sublayer_bound(
    config: T5Config, lengths: list[int], k: int | None, bottleneck: int
) -> float | None:
    """The speed-up of the FFN sublayer if time were multiply-adds; None for a dense arm."""
    if not k:
        return None
    d, tokens, groups = config.d_model, sum(lengths), sum(-(-n // k) for n in lengths)
    ffn = flops.ffn_macs(d, config.d_ff, config.is_gated_act)
    plugin = flops.merge_macs(tokens, d, k) + flops.decompress_macs(tokens, groups, d, bottleneck)
    return tokens * ffn / (groups * ffn + plugin)


def encoder_bound(
    model: nn.Module, batch: int, length: int, k: int | None, bottleneck: int
) -> float | None:
    """The same for the whole encoder."""
    return 1 / flops.count(model, batch, length, k, bottleneck).fraction_left if k else None
