"""What LoRA (peft's) adds to a model's cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from .sites.family import follow
from .sites.find import Found


class Beside(NamedTuple):
    """What LoRA adds to linear layers: multiply-adds a vector, and parameters."""

    macs: int
    parameters: int


class LowRank(NamedTuple):
    """Beside the sublayers of one block."""

    attention: Beside
    keys: Beside
    """Of ``attention``, what runs on that which becomes keys and values."""
    ffn: Beside


def low_rank_parts(found: Found, position: int) -> LowRank:
    """Beside the layers of one block."""
    layer, block = found.layers[position], found.blocks[position]
    steps = found.family.steps or ("",)
    ffn = {id(m): m for step in steps for m in follow(layer, step).modules()}
    rest = [m for m in block.modules() if id(m) not in ffn]
    keys, paths = Beside(0, 0), found.family.attention
    if paths is not None:
        names = (paths.k, paths.v) if not paths.qkv else ()
        ends = [follow(found.attentions[position], name) for name in names]
        keys = low_rank([m for end in ends for m in end.modules()])
    return LowRank(low_rank(rest), keys, low_rank(ffn.values()))


def low_rank(modules: Iterable[nn.Module]) -> Beside:
    """Of the layers among ``modules`` that peft made: what runs now, and what is there."""
    macs = parameters = 0
    for module in modules:
        layer: Any = module
        first, second = (getattr(layer, f"lora_{name}", {}) for name in "AB")
        sizes = {
            name: first[name].weight.numel() + second[name].weight.numel()
            for name in first
            if name in second
        }
        if sizes:
            parameters += sum(sizes.values())
            runs = () if layer.merged or layer.disable_adapters else layer.active_adapters
            macs += sum(sizes.get(name, 0) for name in runs)
    return Beside(macs, parameters)
