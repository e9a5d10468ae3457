"""Finding what to patch in a model, and refusing what would not come out right."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..runtime.state import STATE
from .families import FAMILIES, REFUSED
from .family import ROW, Family, is_a
from .found import Found, parts_of


def find(model: nn.Module, families: tuple[Family, ...] | None = None) -> Found:
    """The one encoder of ``model`` (which may be the encoder itself).

    ``families``: those that are looked for; by default the table's, and those of the patched
    encoders in ``model``.

    Raises:
        TypeError: ``model`` is not a module. ValueError: it has no encoder of these families, or
        more than one, or an encoder without the expected sublayers.
    """
    found = find_all(model, families)
    if len(found) != 1:
        raise ValueError(_not_one(model, families or tuple(FAMILIES.values()), len(found)))
    return parts_of(*found[0])


def find_all(
    model: nn.Module, families: tuple[Family, ...] | None = None
) -> list[tuple[Family, Any]]:
    """Every encoder of ``model`` with its family, once, in the order of ``modules()``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return [
        (family, module)
        for family, module in _stacks(model, families)
        if family.decoder or not getattr(getattr(module, "config", None), "is_decoder", False)
    ]


def _stacks(model: nn.Module, families: tuple[Family, ...] | None) -> list[tuple[Family, Any]]:
    """The same with decoders."""
    rows = FAMILIES.values() if families is None else families
    table = {(family.module, family.encoder): family for family in rows}
    stacks: list[tuple[Family, Any]] = []
    for module in model.modules():
        kinds = type(module).__mro__
        row = next((table[key] for key in map(_key, kinds) if key in table), None)
        own = getattr(kinds[0], ROW, None)
        if own is not None and families is None:  # patched, perhaps by a family of somebody's own
            row = own if is_a(module, own, own.encoder) else None
        if row is not None:
            stacks.append((row, module))
    return stacks


def _key(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__name__


def _not_one(model: nn.Module, families: tuple[Family, ...], number: int) -> str:
    decoders = len(_stacks(model, families)) - number
    kind = getattr(getattr(model, "config", None), "model_type", None)
    text = f"model must hold exactly one encoder of a known family, got {number} in a "
    text += type(model).__name__
    if number == 0 and not decoders and kind:
        text += f" of model_type {kind!r}"
        if kind in REFUSED:
            return f"{text}, which cannot be patched: {REFUSED[kind]}"
        if kind not in FAMILIES:
            text += ": describe it by vk.patch(model, family=vk.Family(...)), see docs/families.md"
        elif kind not in {family.name for family in families}:
            text += ": vk.patch(model) supports it"
    if decoders > 0:
        text += f", and {decoders} with config.is_decoder=True, which stay dense"
    if number > 1:
        text += ": call this for each of them, or see docs/families.md on two encoders in one model"
    return f"{text}. Known here: {', '.join(family.name for family in families)}"


def replaced(module: nn.Module) -> bool:
    """Whether somebody put another ``forward`` into this instance. A module's own one may stand
    there too: accelerate leaves it behind where it removes a hook."""
    forward = module.__dict__.get("forward")
    return forward is not None and not (
        getattr(forward, "__self__", None) is module
        and getattr(forward, "__func__", None) is type(module).forward
    )


def whole_rows(layer: Any) -> None:
    """Refuses chunks of a row: ``transformers`` would run the FFN on one after another.

    Raises:
        ValueError: ``layer.chunk_size_feed_forward`` is not 0.
    """
    size = vars(layer).get("chunk_size_feed_forward")
    if size:
        raise ValueError(
            f"chunk_size_feed_forward must be 0, got {size}: chunks would cut groups of tokens"
        )


def is_patched(model: nn.Module) -> bool:
    return any(STATE in vars(module) for module in model.modules())
