"""The plugin files that the paper's authors released: a torch pickle with one ratio."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.site import Site
from .stored import Settings, key

_NAME = re.compile(
    r"(?:^|\.)mux_layer\.(\d+)\.(mux_layer|demux_adapter\.w_in|demux_adapter\.w_out)\.(weight|bias)$"
)
_FIELDS = {
    ("mux_layer", "weight"): "merge.weight",
    ("mux_layer", "bias"): "merge.bias",
    ("demux_adapter.w_in", "weight"): "adapter.w1",
    ("demux_adapter.w_in", "bias"): "adapter.b1",
    ("demux_adapter.w_out", "weight"): "adapter.w2",
    ("demux_adapter.w_out", "bias"): "adapter.b2",
}


def read(path: Path) -> tuple[Settings, dict[str, Tensor]]:
    """Settings and tensors of such a file; only tensors are read from it.

    Raises:
        ValueError: it is not one.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # Not torch's own words: they advise to load without protection.
        raise ValueError(
            f"source {path} is not a file of tensors: expected a folder that save_plugins wrote, "
            "or the authors' plugin file"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"source {path} must hold a dict, got {type(content).__name__}")
    parts: dict[tuple[int, str], Tensor] = {}
    for name, tensor in content.items():
        match = _NAME.search(str(name))
        if match is None:
            raise ValueError(f"source {path} has an unexpected key {name!r}")
        slot = int(match[1]), _FIELDS[match[2], match[3]]
        if slot in parts:
            raise ValueError(f"source {path} has {name!r} under two prefixes")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        parts[slot] = tensor
    merge, w1 = parts.get((0, "merge.weight")), parts.get((0, "adapter.w1"))
    if merge is None or w1 is None or merge.dim() != 2 or w1.dim() != 2 or not merge.shape[0]:
        raise ValueError(f"source {path} lacks the weights mux_layer and w_in of layer 0")
    k, r, layers = merge.shape[0], w1.shape[0], 1 + max(i for i, _ in parts)
    d = merge.shape[1] // k
    for i in range(layers):
        for field, size in (("merge.bias", k), ("adapter.b1", r), ("adapter.b2", d)):
            parts.setdefault((i, field), torch.zeros(size))
    tensors = {key(Site("ffn", i), k, field): tensor for (i, field), tensor in parts.items()}
    placed = {"ffn": [k]}
    return Settings("", d, layers, r, "tanh", placed, {"ffn": [k] * layers}), tensors
