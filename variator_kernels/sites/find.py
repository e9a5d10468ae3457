"""Finding what to patch in a model, and refusing what would not come out right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..runtime.site import Site
from ..runtime.state import STATE
from .families import FAMILIES, REFUSED
from .family import ROW, Family, blocks_of, follow, is_a, lookup


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
    text = (
        f"model must hold exactly one encoder of a known family, "
        f"{tuple(family.name for family in families)}, got {number} in a {type(model).__name__}"
    )
    if number == 0 and not decoders and kind:
        text += f" of model_type {kind!r}"
        if kind in REFUSED:
            return f"{text}, which cannot be patched: {REFUSED[kind]}"
        if kind not in FAMILIES:
            text += ": describe it by vk.patch(model, family=vk.Family(...)), see docs/families.md"
    if decoders > 0:
        text += f", and {decoders} with config.is_decoder=True, which stay dense"
    if number > 1:
        text += ": call this for each of them, or see docs/families.md on two encoders in one model"
    return text


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


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
