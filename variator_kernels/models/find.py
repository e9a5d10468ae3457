"""Finding what to patch in a model, and refusing what would not come out right."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..ratio import STATE
from .families import FAMILIES, Family, follow


class Found(NamedTuple):
    """One encoder and its parts, in order. Patched and unpatched models look the same."""

    family: Family
    encoder: Any
    blocks: list[Any]
    layers: list[Any]

    @property
    def hidden_size(self) -> int:
        return self.norm_weight(self.layers[0]).shape[0]

    def norm_weight(self, layer: Any) -> Tensor:
        return getattr(layer, self.family.norm).weight


def find(model: nn.Module, families: tuple[Family, ...] = tuple(FAMILIES.values())) -> Found:
    """The one encoder of ``model`` (which may be the encoder itself).

    Raises:
        TypeError: ``model`` is not a module. ValueError: it has no encoder of these families, or
        more than one, or an encoder without the expected sublayers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    encoders = [
        (family, module)
        for module in model.modules()
        for family in families
        if _is_a(module, family, family.encoder) and not getattr(module, "is_decoder", False)
    ]
    known = tuple(family.name for family in families)
    if len(encoders) != 1:
        raise ValueError(
            f"model must hold exactly one encoder of a known family, {known}, got "
            f"{len(encoders)} in a {type(model).__name__}"
        )
    family, encoder = encoders[0]
    try:
        blocks = list(follow(encoder, family.blocks))
        layers = [follow(block, family.sublayer) for block in blocks]
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"model lacks the expected sublayers: {error}") from error
    if not layers:
        raise ValueError("model's encoder has no blocks")
    for position, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
        for part, name in ((block, family.block), (layer, family.layer)):
            if not _is_a(part, family, name):
                got = type(part).__name__
                raise ValueError(f"model's block {position} must have a {name}, got {got}")
        for path in (family.norm, family.dense, family.outer_dropout):
            if not hasattr(layer, path):
                raise ValueError(f"model's FFN sublayer {position} has no {path!r}")
    return Found(family, encoder, blocks, layers)


def check_unchanged(found: Found) -> None:
    """Every class is exactly the family's, and every ``forward`` its own.

    Raises:
        ValueError: somebody replaced one; the message says which.
    """
    family = found.family
    module = importlib.import_module(family.module)
    norms = [getattr(layer, family.norm) for layer in found.layers]
    parts = [(found.encoder, family.encoder)]
    parts += [(block, family.block) for block in found.blocks]
    parts += [(layer, family.layer) for layer in found.layers]
    parts += [(norm, family.norm_class) for norm in norms]
    for part, name in parts:
        kind = getattr(module, name)
        if type(part) is not kind:
            raise ValueError(f"model must have a plain {name}, got {_full_name(type(part))}")
        source = inspect.unwrap(kind.forward).__module__
        own = source == family.module or name == family.norm_class
        if "forward" in vars(part) or not own:
            raise ValueError(
                f"the forward of {name} was replaced; patch the model before other tools do, or "
                "undo theirs first"
            )


def is_patched(model: nn.Module) -> bool:
    return any(STATE in vars(module) for module in model.modules())


def _is_a(module: nn.Module, family: Family, name: str) -> bool:
    # By name along the MRO: no family has to be imported only to see that it is absent.
    return any(
        kind.__name__ == name and kind.__module__ == family.module for kind in type(module).__mro__
    )


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
