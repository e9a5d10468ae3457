"""Refusing models that a wrapper has taken stock of, or whose weights come and go."""

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


def check_present(module: nn.Module) -> None:
    """The weights of ``module`` and all in it are there outside of their own modules' forwards.

    Raises:
        ValueError: accelerate brings some in and takes them away again.
    """
    for name, part in module.named_modules():
        if "_hf_hook" in part.__dict__:
            raise ValueError(
                f"model must hold its weights on its own device, accelerate's hook is on "
                f"{name or type(part).__name__} (cpu_offload, disk_offload, dispatch_model or a "
                "device_map): compressed FFNs read weights that such a hook shows to one forward "
                "alone. Load the encoder whole onto one device, or call "
                "accelerate.hooks.remove_hook_from_submodules(model); ratio 1 runs with hooks"
            )


NO_VALUES = (
    "model must have its weights, {} is on the meta device, without values: give the model its "
    "weights, then patch it and load plugins (one patched there: unpatch() first); where "
    "accelerate offloaded it, remove its hooks"
)


def check_values(module: nn.Module) -> None:
    """No parameter in ``module`` is on the meta device.

    Raises:
        ValueError: one is; the message names it.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(NO_VALUES.format(name))


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
