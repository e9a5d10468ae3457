"""What LoRA (peft's) adds to a model's cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from .sites.family import follow, lookup
from .sites.found import Found


class Beside(NamedTuple):
    """What LoRA adds to linear layers: multiply-adds a vector, and parameters."""

    macs: int
    parameters: int


class LowRank(NamedTuple):
    """Beside the sublayers of one block."""

    attention: Beside
    keys: Beside
    """Of ``attention``, what runs on that which becomes keys and values."""
    distances: Beside
    """Of ``attention``, what runs on vectors of distances alone."""
    ffn: Beside


def low_rank_parts(found: Found, position: int) -> LowRank:
    """Beside the layers of one block."""
    layer, block = found.layers[position], found.blocks[position]
    steps = found.family.steps or ("",)
    ffn = {id(m): m for step in steps for m in follow(layer, step).modules()}
    rest = [m for m in block.modules() if id(m) not in ffn]
    keys = distances = Beside(0, 0)
    paths = found.family.attention
    if paths is not None:
        attention, apart = found.attentions[position], paths.distances
        keys = _ends(attention, (paths.k, paths.v) if not paths.qkv else ())
        distances = _ends(attention, (apart.k, apart.q) if apart is not None else ())
    return LowRank(low_rank(rest), keys, distances, low_rank(ffn.values()))


def _ends(attention: nn.Module, paths: Iterable[str]) -> Beside:
    ends = [lookup(attention, path) for path in paths]
    return low_rank([m for end in ends if end is not None for m in end.modules()])


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
