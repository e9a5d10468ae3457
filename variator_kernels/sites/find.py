"""Finding what to patch in a model, and refusing what would not come out right."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..runtime.state import STATE
from .families import FAMILIES
from .family import Family, blocks_of, follow, is_a, lookup
from .loading import ATTACHED


class Found(NamedTuple):
    """One encoder and its parts, in order. Patched and unpatched models look the same."""

    family: Family
    encoder: Any
    blocks: list[Any]
    layers: list[Any]

    @property
    def owners(self) -> tuple[int, ...]:
        """For each layer the first that is the same module: itself, unless modules are shared."""
        first: dict[int, int] = {}
        return tuple(first.setdefault(id(layer), i) for i, layer in enumerate(self.layers))

    @property
    def own_layers(self) -> list[tuple[int, Any]]:
        """Every sublayer once, with its number."""
        return [(i, self.layers[i]) for i, owner in enumerate(self.owners) if i == owner]

    @property
    def hidden_size(self) -> int:
        return self.encoder.config.hidden_size

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self.encoder.config.vocab_size

    def parts(self) -> list[tuple[Any, str]]:
        """Every module that patching changes, once, with its class's name."""
        family = self.family
        parts = [(self.encoder, family.encoder)]
        parts += [(block, family.block) for block in self.blocks]
        if family.layer != family.block:
            parts += [(layer, family.layer) for layer in self.layers]
        return parts

    def like(self, position: int) -> Tensor:
        """A weight whose place and type the plugins of one sublayer take: what the FFN multiplies
        first (an fp16 T5 keeps ``wo`` in fp32), or another of the block where that is quantised."""
        first = (lookup(self.layers[position], f"{name}.weight") for name in self.family.w_in)
        for weight in (*first, *self.blocks[position].parameters()):
            if isinstance(weight, Tensor) and weight.is_floating_point():
                return weight
        raise ValueError(f"model's block {position} has no floating point parameter")


def find(model: nn.Module, families: tuple[Family, ...] = tuple(FAMILIES.values())) -> Found:
    """The one encoder of ``model`` (which may be the encoder itself).

    Raises:
        TypeError: ``model`` is not a module. ValueError: it has no encoder of these families, or
        more than one, or an encoder without the expected sublayers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    stacks = [
        (family, module)
        for module in model.modules()
        for family in families
        if is_a(module, family, family.encoder)
    ]
    encoders = [
        (family, module)
        for family, module in stacks
        if not getattr(module.config, "is_decoder", False)
    ]
    known = tuple(family.name for family in families)
    if len(encoders) != 1:
        decoders = len(stacks) - len(encoders)
        kind = getattr(getattr(model, "config", None), "model_type", None)
        raise ValueError(
            f"model must hold exactly one encoder of a known family, {known}, got "
            f"{len(encoders)} in a {type(model).__name__}"
            + (f" of model_type {kind!r}" if kind and not stacks else "")
            + (f", and {decoders} with config.is_decoder=True, which stay dense" * (decoders > 0))
        )
    family, encoder = encoders[0]
    try:
        blocks = blocks_of(encoder, family)
        layers = [follow(block, family.sublayer) for block in blocks]
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"model lacks the expected sublayers: {error}") from error
    if not layers:
        raise ValueError("model's encoder has no blocks")
    for position, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
        for part, name in ((block, family.block), (layer, family.layer)):
            if not is_a(part, family, name):
                got = type(part).__name__
                raise ValueError(f"model's block {position} must have a {name}, got {got}")
        for path in (*family.steps, *family.bypassed):
            if lookup(layer, path) is None:
                raise ValueError(f"model's FFN sublayer {position} has no {path!r}")
    return Found(family, encoder, blocks, layers)


def check_unchanged(found: Found) -> None:
    """Every class is exactly the family's, every ``forward`` its own, no layer cuts its rows, and
    the name of plugins is free.

    Raises:
        ValueError: somebody replaced one; the message says which.
    """
    family = found.family
    module = importlib.import_module(family.module)
    norms = [lookup(layer, family.norm) for layer in found.layers] if family.norm else []
    for part, name in (*found.parts(), *((norm, family.norm_class) for norm in norms)):
        kind = getattr(module, name, None) or getattr(nn, name)
        if type(part) is not kind:
            raise ValueError(f"model must have a plain {name}, got {_full_name(type(part))}")
        source = inspect.unwrap(kind.forward).__module__
        own = source == family.module or name == family.norm_class
        if replaced(part) or not own:
            raise ValueError(
                f"the forward of {name} was replaced; patch the model before other tools do, or "
                "undo theirs first"
            )
    for layer in found.layers:
        whole_rows(layer)
        if hasattr(layer, ATTACHED):
            raise ValueError(
                f"model's {type(layer).__name__} must not have {ATTACHED!r}, the name that plugins "
                f"take, got {type(getattr(layer, ATTACHED)).__name__}: rename or remove it"
            )


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


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
