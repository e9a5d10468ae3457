"""An encoder's blocks and sublayers, and refusing what lacks some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..runtime.site import Site
from .family import Family, blocks_of, follow, is_a, lookup


class Found(NamedTuple):
    """One encoder and its parts, in order. Patched and unpatched models look the same."""

    family: Family
    encoder: Any
    blocks: list[Any]
    layers: list[Any]
    """The FFN sublayers."""

    @property
    def attentions(self) -> list[Any]:
        """The self-attention sublayers, where the family says where they are."""
        paths = self.family.attention
        return [] if paths is None else [follow(block, paths.sublayer) for block in self.blocks]

    def has(self, site: Site) -> bool:
        """Whether there can be a site: not at a decoder's sliding attention."""
        paths = self.family.attention
        if site.placement == "ffn" or paths is None or not paths.sliding:
            return True
        return lookup(self.at(site), paths.sliding) is None

    def at(self, site: Site) -> Any:
        """The sublayer of a site."""
        if site.placement == "ffn":
            return self.layers[site.layer]
        assert self.family.attention is not None
        return follow(self.blocks[site.layer], self.family.attention.sublayer)

    @property
    def own_layers(self) -> list[tuple[int, Any]]:
        """Every FFN sublayer once, with the number of the first layer that it is."""
        first: dict[int, int] = {}
        return [(i, x) for i, x in enumerate(self.layers) if first.setdefault(id(x), i) == i]

    @property
    def hidden_size(self) -> int:
        size = getattr(getattr(self.encoder, "config", None), "hidden_size", None)
        return self.like(0).shape[-1] if size is None else size

    @property
    def vocabulary(self) -> int:
        """How many token ids there are; a configuration that does not say so bears any."""
        return getattr(getattr(self.encoder, "config", None), "vocab_size", 1 << 62)

    @property
    def pads_to(self) -> int:
        """What the encoder makes the length of its rows a multiple of."""
        if not self.family.pads:
            return 1
        size = follow(self.encoder.config, self.family.pads)
        return size if isinstance(size, int) else max(size)

    def parts(self, placements: Iterable[str] = ("ffn",)) -> list[tuple[Any, str]]:
        """Every module that patching for ``placements`` changes, with its class's name."""
        family = self.family
        parts = [(self.encoder, family.encoder)]
        parts += [(block, family.block) for block in self.blocks]
        if family.layer != family.block and "ffn" in placements:
            parts += [(layer, family.layer) for layer in self.layers]
        if family.attention is not None and set(placements) - {"ffn"}:
            parts += [(layer, family.attention.layer) for layer in self.attentions]
            if family.attention.carrier:
                carrier = follow(self.encoder, family.attention.carrier)
                parts.append((carrier, family.attention.carrier_class))
        return parts

    def like_at(self, site: Site) -> Tensor:
        """A weight whose place and type the plugins of a site take."""
        if site.placement == "ffn":
            return self.like(site.layer)
        for weight in self.at(site).parameters():
            if weight.is_floating_point():
                return weight
        return self.like(site.layer)  # the whole sublayer is quantised

    def like(self, position: int) -> Tensor:
        """A weight whose place and type the plugins of one sublayer take: what the FFN multiplies
        first (an fp16 T5 keeps ``wo`` in fp32), or another of the block where that is quantised."""
        first = (lookup(self.layers[position], f"{name}.weight") for name in self.family.w_in)
        for weight in (*first, *self.blocks[position].parameters()):
            if isinstance(weight, Tensor) and weight.is_floating_point():
                return weight
        raise ValueError(f"model's block {position} has no floating point parameter")


def parts_of(family: Family, encoder: Any) -> Found:
    """The blocks and sublayers of an encoder.

    Raises:
        ValueError: it lacks some; the message names the family's field and what was found.
    """
    try:
        blocks = blocks_of(encoder, family)
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"model's {family.encoder} lacks the expected sublayers, family.blocks is "
            f"{family.blocks!r}: {error}"
        ) from error
    if not blocks:
        raise ValueError(f"model's encoder has no blocks at {family.blocks!r} (family.blocks)")
    layers = []
    for position, block in enumerate(blocks):
        _check_class(block, family, "block", position)
        try:
            layers.append(follow(block, family.sublayer))
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(
                f"model's block {position} lacks the expected sublayers, family.sublayer is "
                f"{family.sublayer!r}: {error}"
            ) from error
        _check_class(layers[-1], family, "layer", position)
        _check_paths(layers[-1], family, position)
    return Found(_form(family, blocks), encoder, blocks, layers)


def _form(family: Family, blocks: list[Any]) -> Family:
    """With the attention that the blocks have."""
    for form in family.forms()[1:]:
        assert form.attention is not None
        try:
            sublayers = [follow(block, form.attention.sublayer) for block in blocks]
        except (AttributeError, IndexError, TypeError):
            continue
        if all(is_a(layer, form, form.attention.layer) for layer in sublayers):
            return form
    return family


def _check_class(part: Any, family: Family, field: str, position: int) -> None:
    name = getattr(family, field)
    if not is_a(part, family, name):
        raise ValueError(
            f"model's block {position} must have a {name} (family.{field}, of {family.module}), "
            f"got {full_name(type(part))}"
        )


def _check_paths(layer: Any, family: Family, position: int) -> None:
    """Whatever must be there is there."""
    fields = ("steps", "bypassed", "called", "w_out", "act", "norm", "outer_dropout")
    paths = [(field, path) for field in fields for path in _paths(getattr(family, field))]
    for field, path in paths:
        if lookup(layer, path) is None:
            raise ValueError(
                f"model's FFN sublayer {position} has no {path!r} (family.{field}): its "
                f"{type(layer).__name__} has {_children(layer)}"
            )
    if all(lookup(layer, path) is None for path in family.w_in):
        raise ValueError(
            f"model's FFN sublayer {position} has none of {family.w_in} (family.w_in): its "
            f"{type(layer).__name__} has {_children(layer)}"
        )
    if family.layer == family.block and not family.called and not hasattr(layer, family.method):
        raise ValueError(
            f"model's {family.layer} has no method {family.method!r} (family.method): where its "
            "forward calls the FFN's modules one after another, family.called names them"
        )


def _paths(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(filter(None, (value,) if isinstance(value, str) else value))


def _children(layer: nn.Module) -> list[str]:
    return [name for name, _ in layer.named_modules() if name and name.count(".") < 2]


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
