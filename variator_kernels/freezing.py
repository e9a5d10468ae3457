"""How changes of a patched model's weights are noticed, and the promise that there are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from . import extension
from .ops.frozen_linear import FrozenLinear, is_plain_weight
from .ops.int8_linear import torchao
from .ops.packed import cache
from .runtime.state import states
from .sites.install import patched_sublayers
from .sites.mixins import DESCRIBED

Model = TypeVar("Model", bound=nn.Module)
RULES = {
    "tracked": "the kernel reports writes",
    "read": "read at every look",
    "frozen": "frozen by vk.freeze",
}


def freeze(model: Model) -> Model:
    """Promise that the weights of the patched sublayers stay, so that no forward looks at them.

    On the CPU a patched model multiplies with packed copies of these weights. Before each use it
    finds out whether they were written since. Where the kernel reports writes (Linux 6.7 and newer,
    unless a container forbids it) that takes microseconds. Elsewhere all of them are read, and
    products of few rows are not packed; this promise spares both. ``python -m variator_kernels``
    tells which machine this is.

    Plugins are no part of the promise. Call it after the last change: a weight that is moved,
    converted or replaced afterwards, and the weights of a copy of the model, are not frozen. The
    next forward after a write that PyTorch counts (``load_state_dict``, an optimizer, an in-place
    operation) raises RuntimeError; what is written through ``.data`` or NumPy goes unnoticed.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is not patched.
    """
    if extension.load() is not None:
        cache.freeze(_weights(model))
    return model


def thaw(model: Model) -> Model:
    """Undo :func:`freeze`: what was written meanwhile counts from now on.

    Raises:
        ValueError: the model is not patched.
    """
    cache.thaw(_weights(model))
    return model


def packed_weights(model: nn.Module) -> str:
    """How many bytes packed copies take now, and how changes of what they were made of are
    noticed: a line for :func:`describe`."""
    weights = list(_weights(model))
    rules = cache.rules(weights)
    if not rules:
        return "none yet"
    noticed = ", ".join(
        f"{_mib(rules[rule])} {text}" for rule, text in RULES.items() if rule in rules
    )
    return f"{_mib(cache.nbytes(weights))}; of their originals {noticed}"


def how_writes_are_noticed() -> str:
    """What holds on this machine: a line for ``python -m variator_kernels``."""
    cpu = extension.load()
    if cpu is None:
        return "nothing is packed without the CPU kernels"
    why = cpu.why_not_tracked()
    if not why:
        return "the kernel reports writes to weights"
    return f"weights are read at every look, vk.freeze(model) spares that: {why}"


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """What products and norms of the patched sublayers, and other packed products, read on the
    CPU."""
    states(model)
    read = [
        tensor
        for layer in patched_sublayers(model)
        for tensor in _flat(vars(layer)[DESCRIBED].of(layer))
    ]
    read += torchao.memory(model.parameters())
    # Whole matrices, of which a description may hold views.
    for module in model.modules():
        read += (module.weight, module.bias) if _is_packed(module) else ()
    for tensor in {id(tensor): tensor for tensor in read}.values():
        # Those of a subclass (quantised, sharded) have no memory of their own.
        if isinstance(tensor, Tensor) and is_plain_weight(tensor) and tensor.device.type == "cpu":
            yield tensor


def _flat(description: Any) -> Iterator[Any]:
    """A description's fields, and those of the tuples in it."""
    if isinstance(description, tuple):
        for field in description:
            yield from _flat(field)
    else:
        yield description


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, FrozenLinear) and module.has_plain_weight()


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
