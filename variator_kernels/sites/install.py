"""Putting modules at the sites of a model by class swapping, and taking them off again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..ops import prepacked_linear
from ..ops.frozen_linear import FrozenLinear, is_plain_class
from ..ops.int8_linear import module as int8
from ..runtime.site import Site
from ..runtime.state import STATE, State, states
from .attention import DescribedAttention
from .classes import patched_class, when_patched
from .family import ORIGINAL, REACH, follow, lookup
from .feed_forward import DescribedFeedForward
from .find import replaced
from .found import Found
from .loading import ATTACHED
from .mixins import DESCRIBED, SITE, SitePosition
from .plain import plain_linear
from .quantised import stored_product
from .reach import reach
from .unchanged import check_attention, check_unchanged, module_of


def sites_of(found: Found, placements: Iterable[str]) -> tuple[Site, ...]:
    """Every site of these placements in an encoder."""
    layers = range(len(found.blocks))
    every = (Site(placement, layer) for placement in placements for layer in layers)
    return tuple(filter(found.has, every))


def owners_of(found: Found, sites: tuple[Site, ...]) -> tuple[int, ...]:
    """For each site the first that is the same module: itself, unless modules are shared."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(found.at(site)), i) for i, site in enumerate(sites))


def attached(model: nn.Module) -> list[Any]:
    """What a method put at each site of every patched model inside ``model``."""
    return [layer._modules[ATTACHED] for layer in patched_sublayers(model)]


def patched_sublayers(model: nn.Module) -> list[nn.Module]:
    """Every sublayer inside ``model`` at which there is a site, once."""
    return [module for module in model.modules() if SITE in vars(module)]


def attached_keys(model: nn.Module) -> set[str]:
    """The keys of all that in ``model.state_dict()``."""
    return {
        f"{name}.{ATTACHED}.{key}".lstrip(".")
        for name, layer in model.named_modules(remove_duplicate=False)
        if SITE in vars(layer)
        for key in layer._modules[ATTACHED].state_dict()  # type: ignore[union-attr]
    }


def install(model: nn.Module, found: Found, state: State, modules: Mapping[int, nn.Module]) -> None:
    """Put ``modules``, by number of the site, into ``model`` that holds ``found``.

    Whatever goes wrong on the way is undone.
    """
    try:
        _install(model, found, state, modules)
    except BaseException:
        _remove(model)
        raise


def _install(
    model: nn.Module, found: Found, state: State, modules: Mapping[int, nn.Module]
) -> None:
    dense = _dense_placements(found, state)  # looks at what nobody has changed yet
    for number, module in modules.items():
        site = state.sites[number]
        layer = found.at(site)
        vars(layer)[SITE] = SitePosition(site, number)
        layer.add_module(ATTACHED, module)
        if site.placement == "ffn":
            vars(layer)[DESCRIBED] = DescribedFeedForward()
        else:
            vars(layer)[DESCRIBED] = DescribedAttention()
    placements = {site.placement for site in state.sites} | dense
    if placements - {"ffn"}:
        _reach(found)
    for layers, described in (
        (found.layers if "ffn" in placements else (), DescribedFeedForward),
        (found.attentions if placements - {"ffn"} else (), DescribedAttention),
    ):
        for layer in layers:
            vars(layer).setdefault(DESCRIBED, described())
    for part, name in found.parts(placements):
        vars(part).pop("forward", None)  # its own, which would go before the new class's
        part.__class__ = patched_class(found.family, name)
        vars(part)[STATE] = state
    _swap_norms(found, state)
    _swap_products(found, state)
    for call in when_patched:
        call()


def _dense_placements(found: Found, state: State) -> set[str]:
    """Where there are no sites, but dense sublayers that run in few passes: what nobody changed,
    and the family describes."""
    config, taken = state.method.config, {site.placement for site in state.sites}
    if config.optimize != "encoder" or found.family.decoder:
        return set()
    extra = set()
    if "ffn" not in taken and _is_unchanged(found, "ffn"):
        extra.add("ffn")
    known = found.family.attention is not None
    if known and not taken - {"ffn"} and _is_unchanged(found, "attention_kv"):
        extra.add("attention_kv")
    return extra


def _is_unchanged(found: Found, placement: str) -> bool:
    try:
        if placement != "ffn":
            check_attention(found)
        check_unchanged(found, (placement,))
    except ValueError:
        return False
    return True


def _swap_norms(found: Found, state: State) -> None:
    """Of those that are the family's own: somebody's faster one stays."""
    family = found.family
    for block in found.blocks if family.block_norms else ():
        for path in family.block_norms:
            norm = follow(block, path)
            plain = type(norm) is getattr(module_of(family), family.block_norm_class)
            if plain and not replaced(norm):
                norm.__class__ = patched_class(family, family.block_norm_class)
                vars(norm)[STATE] = state


def _swap_products(found: Found, state: State) -> None:
    """The frozen products that run as modules, of dense sublayers above all: of patched sublayers,
    or of all blocks. What is no plain linear layer (hooked, sharded, quantised otherwise than by
    torchao to int8) stays."""
    config = state.method.config
    if config.optimize is None and config.precision is None:
        return
    new: Any = prepacked_linear.Linear
    stored: Any = int8.StoredLinear
    if config.precision == "int8":
        new, stored = int8.Linear, int8.RoundedStoredLinear
    if config.optimize == "encoder":
        products = [module for block in found.blocks for module in block.modules()]
    else:
        products = [one for _, site in state.own_sites for one in products_of(found, site)]
    for product in products:
        if type(product) is not nn.Linear:
            continue
        if plain_linear(product):
            kind = new
        elif not isinstance(stored_product(product), str):
            kind = stored
        else:
            continue
        vars(product).pop("forward", None)  # its own, which would go before the new class's
        product.__class__ = kind


def products_of(found: Found, site: Site) -> list[Any]:
    """The modules of a site's frozen products."""
    family = found.family
    if site.placement == "ffn":
        paths = (*family.w_in, family.w_gate, family.w_out)
    else:
        assert family.attention is not None
        a = family.attention
        paths = (a.q, a.k, a.v, a.qkv, a.o)
    found_there = (lookup(found.at(site), path) for path in paths)
    return [product for product in found_there if product is not None]


def _reach(found: Found) -> None:
    """Give each self-attention sublayer what it needs of its encoder. Not as submodules: keys of
    the state dict stay what they are."""
    paths = found.family.attention
    assert paths is not None
    for number, (block, layer) in enumerate(zip(found.blocks, found.attentions, strict=True)):
        needs = vars(layer)[REACH] = reach(found.encoder, block, number, paths)
        inner, lent = follow(layer, paths.table_of), needs.lent
        if lent and not lent.keys() & inner._modules.keys():
            # A T5 makes its bias in the first block. Where that is compressed, another must.
            vars(inner).update(lent | {f"has_{next(iter(lent))}": True, _LENT: tuple(lent)})


_LENT = "variator_lent"
"""Attribute of a module that holds another's tables: their names; ``has_`` the first: it has."""


def remove(model: nn.Module) -> None:
    """Bring back the original classes of every patched model inside ``model``.

    Raises:
        ValueError: nothing is patched, or somebody replaced a patched ``forward`` since.
    """
    states(model)
    for module in model.modules():
        swapped = isinstance(module, FrozenLinear)
        if swapped and not is_plain_class(type(module)):
            raise ValueError(
                f"a linear layer became a {type(module).__name__} after patching (parametrised?); "
                "undo that before unpatch()"
            )
        if not swapped and STATE not in vars(module):
            continue
        # What accelerate leaves behind after training in mixed precision goes too.
        if replaced(module) and "_original_forward" not in vars(module):
            raise ValueError(
                f"the forward of {type(module).__name__} was replaced after patching; undo that "
                "before unpatch()"
            )
    _remove(model)


def _remove(model: nn.Module) -> None:
    """Take off what there is, also of an installation that did not end."""
    for module in list(model.modules()):
        own = vars(module)
        if _LENT in own:
            names = own.pop(_LENT)
            own[f"has_{names[0]}"] = False
            for name in names:
                own.pop(name, None)
        if isinstance(module, FrozenLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
        if STATE not in own and SITE not in own:
            continue
        if SITE in own:
            module._modules.pop(ATTACHED, None)
        for name in ("forward", "_original_forward", STATE, SITE, DESCRIBED, REACH):
            own.pop(name, None)
        if ORIGINAL in vars(type(module)):
            module.__class__ = getattr(type(module), ORIGINAL)
