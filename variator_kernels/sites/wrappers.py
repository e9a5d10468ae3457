"""Refusing models that a wrapper has already taken stock of: parameters made now come too late."""

from __future__ import annotations

import gc
import sys
from typing import Any

from torch import nn

_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("torch.distributed.fsdp", "FSDPModule"),
)


def check_unwrapped(model: nn.Module) -> None:
    """Nothing in ``model``, and nothing around it, averages or shards its gradients.

    Raises:
        ValueError: something does; the message names it and the right order.
    """
    kinds = tuple(
        kind
        for module, name in _WRAPPERS
        if (kind := getattr(sys.modules.get(module), name, None)) is not None
    )
    for wrapper in (*_inside(model, kinds), *_around(model, kinds)):
        name = type(wrapper).__name__
        raise ValueError(
            f"model must be patched before it is wrapped, it is in a {name}, which would never see "
            "the plugins' gradients: unwrap it, vk.patch(model), and wrap it again"
        )


def _inside(model: nn.Module, kinds: tuple[type, ...]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kinds)]


def _around(model: nn.Module, kinds: tuple[type, ...]) -> list[nn.Module]:
    """Wrappers that hold ``model``: it does not know them, so all objects are looked through."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return []
    parts = set(map(id, model.modules()))
    wrappers: list[Any] = [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]
    return [w for w in wrappers if any(id(module) in parts for module in w.modules())]
