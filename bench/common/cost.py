"""The cost bound: dense over compressed multiply-adds."""

from __future__ import annotations

from typing import Any

from torch import nn

from variator_kernels import flops
from variator_kernels.sites.families import FAMILIES


def sublayer_bound(config: Any, lengths: list[int], k: int | None, bottleneck: int) -> float | None:
    """The speed-up of the FFN sublayer if time were multiply-adds; None for a dense arm."""
    if not k:
        return None
    d, tokens, groups = config.hidden_size, sum(lengths), sum(-(-n // k) for n in lengths)
    gated = getattr(config, "is_gated_act", False)
    ffn = flops.ffn_macs(d, inner_size(config), gated)
    plugin = flops.merge_macs(tokens, d, k) + flops.decompress_macs(tokens, groups, d, bottleneck)
    return tokens * ffn / (groups * ffn + plugin)


def inner_size(config: Any) -> int:
    """f, whatever the family calls it."""
    return getattr(config, FAMILIES[config.model_type].inner_size)


def encoder_bound(
    model: nn.Module, batch: int, length: int, k: int | None, bottleneck: int
) -> float | None:
    """The same for the whole encoder."""
    return 1 / flops.count(model, batch, length, k, bottleneck).fraction_left if k else None
