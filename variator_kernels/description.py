"""What a patched model is and does, in words."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import backends
from .freezing import packed_weights
from .methods.variator.method import plugin_parameters
from .ops import int8_linear
from .ops.int8_linear import StoredWeight
from .runtime.level import Level
from .runtime.site import Site
from .runtime.state import STATE, State, kept_masks, states
from .sites.find import find_all
from .sites.found import Found
from .sites.in_place import patched
from .sites.install import products_of
from .sites.plain import plain_linear
from .sites.quantised import stored_products


def describe(model: nn.Module) -> str:
    """A patched model as text to print, a fact a line.

    Family, method, sites, ratios and the level that holds here, the backend that runs on the
    model's device, plugins and their size, the tokens that stay whole, packed copies of weights and
    how changes of these are noticed, and the ratios whose plugins still have their initial values.

    Raises:
        TypeError: ``model`` is not a module. ValueError: it is not patched.
    """
    states(model)
    own = {id(encoder): family for family, encoder in find_all(model)}
    named = [(n, m) for n, m in model.named_modules() if id(m) in own and STATE in vars(m)]
    if len(named) < 2:
        return _text(lines(named[0][1] if named else model))
    return "\n\n".join(_text([("encoder", name), *lines(part)]) for name, part in named)


def _text(facts: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in facts) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in facts)


OPTIMIZED = {
    "sublayers": "linear layers of patched sublayers run {} at dense levels too",
    "encoder": "all linear layers of the encoder's blocks run {}, dense parts in few passes",
}


def lines(model: nn.Module) -> list[tuple[str, str]]:
    """The same as names and values."""
    found, state = patched(model)
    config = state.method.config
    return [
        ("family", f"{state.family}, hidden size {found.hidden_size}"),
        ("method", f"{state.method.name}, bottleneck {config.bottleneck}, {config.activation}"),
        ("sites", _sites(state)),
        ("ratios", _ratios(state)),
        ("level", _level(state.current(), state.sites)),
        ("backend", _backend(config.backend, found.like(0))),
        ("plugins", _size(plugin_parameters(model))),
        ("kept whole", _kept(state, found.family.decoder)),
        ("packed", packed_weights(model) if config.pack else "nothing: pack=False"),
        ("precision", _precision(config.precision, found.like(0))),
        *_optimized(config.optimize, config.precision, found.like(0)),
        *_quantised(state, found),
        *(
            (f"trained, {_named(state, place, k)}", _trained(state, found, place, k))
            for place, ratios in state.method.placements.items()
            for k in ratios
        ),
    ]


def _sites(state: State) -> str:
    by_placement: dict[str, int] = {}
    for site in state.sites:
        by_placement[site.placement] = by_placement.get(site.placement, 0) + 1
    own = len(set(state.owners))
    shared = f", {own} modules" if own < len(state.sites) else ""
    return ", ".join(f"{place}: {n} layers" for place, n in by_placement.items()) + shared


def _level(level: Level, sites: tuple[Site, ...]) -> str:
    if level.uniform is not None:
        return "1 (dense)" if level.is_dense else f"{level.uniform}"
    chosen: dict[str, dict[int, int]] = {}
    for site, ratio in zip(sites, level.ratios, strict=True):
        if ratio > 1:
            chosen.setdefault(site.placement, {})[site.layer] = ratio
    return f"{chosen}, other layers dense"


def _backend(asked: str, like: Tensor) -> str:
    where = f"{str(like.dtype).removeprefix('torch.')} on {like.device}"
    try:
        runs = backends.resolve(asked, like)
    except ValueError as error:
        return f"none for {where}: {error}"
    return f"{runs} for {where}" + (" (auto)" if asked == "auto" else "")


def _precision(precision: str | None, like: Tensor) -> str:
    own = str(like.dtype).removeprefix("torch.")
    if precision is None:
        return f"{own}, the model's own"
    if not like.is_cpu:
        return f"{own}: nothing runs in {precision} on {like.device}"
    if int8_linear.kernel() is None:
        return f"{own}: {precision} products are {int8_linear.describe()}"
    how = int8_linear.describe()
    return f"{precision} in eval() with gradients disabled, else {own}; by {how}"


def _optimized(optimize: str | None, precision: str | None, like: Tensor) -> list[tuple[str, str]]:
    if optimize is None and precision is None:
        return []
    how = "packed" if precision is None else f"in {precision}"
    if not like.is_cpu or (precision is not None and int8_linear.kernel() is None):
        return [("optimized", "nothing: linear layers run as they did")]
    # A precision reaches as far by itself.
    return [("optimized", OPTIMIZED[optimize or "sublayers"].format(how))]


def _quantised(state: State, found: Found) -> list[tuple[str, str]]:
    """What runs of layers that are no plain ones, where there are any."""
    precision = state.method.config.precision
    numbers: dict[tuple[str, str], int] = {}
    for _, site in state.own_sites:
        linears = products_of(found, site)
        if all(map(plain_linear, linears)):
            continue
        for layers in [linears] if site.placement == "ffn" else [[linear] for linear in linears]:
            read = stored_products(layers)
            for product in [read] * len(layers) if isinstance(read, str) else read:
                if isinstance(product, str):
                    fact = "as modules", product
                else:
                    fact = _stored(product.weight, precision, found.like_at(site))
                numbers[fact] = numbers.get(fact, 0) + 1
    return [(row, f"{n} linear layers: {text}") for (row, text), n in numbers.items()]


def _stored(weight: StoredWeight, precision: str | None, like: Tensor) -> tuple[str, str]:
    """The row of a weight that came in int8, and its text."""
    if not weight.numbers.is_cpu:
        return "as modules", f"on {weight.numbers.device}"
    if int8_linear.bears(weight.numbers) and (weight.dynamic or precision == "int8"):
        how = f"activations too, by {int8_linear.describe()}"
    elif weight.dynamic:
        return "as modules", f"weights of 8 bits, int8 products are {int8_linear.describe()}"
    else:
        how = f"activations not, packed in {str(like.dtype).removeprefix('torch.')}"
    return "int8 weights", f"{how}; in eval() with gradients disabled, else as modules"


def _size(parameters: list[nn.Parameter]) -> str:
    number = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    return f"{number:,} parameters, {size:,} bytes"


def _kept(state: State, decoder: bool) -> str:
    kept = state.kept
    facts = [f"first {kept.first}, last {kept.last}"]
    if kept.ids:
        facts.append(f"ids {', '.join(map(str, kept.ids))}")
    if any(site.placement == "attention_kv" for site in state.sites) and decoder:
        facts.append(f"window {kept.window}")
    if state in kept_masks.get():
        facts.append("those of vk.keep's mask")
    return ", ".join(facts)


def _ratios(state: State) -> str:
    named = {p: ", ".join(map(str, r)) for p, r in state.method.placements.items()}
    if len(set(named.values())) == 1:
        return next(iter(named.values()))
    return "; ".join(f"{place}: {ratios}" for place, ratios in named.items())


def _named(state: State, placement: str, ratio: int) -> str:
    return f"{placement}, k={ratio}" if len(state.method.placements) > 1 else f"k={ratio}"


def _trained(state: State, found: Found, placement: str, ratio: int) -> str:
    """Whether the plugins of a ratio were calibrated, or differ from those that it starts with."""
    layers: list[tuple[int, Any]] = [
        (n, found.at(site)) for n, site in state.own_sites if site.placement == placement
    ]
    parameters = [p for _, layer in layers for p in layer.plugins[str(ratio)].parameters()]
    if any(p.is_meta or type(p) is not nn.Parameter for p in parameters):
        return "not known: not all values are here"
    trained = sum(
        (n, ratio) in state.fitted or state.method.is_trained(layer, ratio) for n, layer in layers
    )
    if trained in (0, len(layers)):
        return "yes" if trained else "no"
    return f"{trained} of {len(layers)} sites"
