"""A method's parts are checked, made and put at the sites of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from . import backends
from .methods.projected import is_projected
from .methods.variator.config import configure
from .methods.variator.method import Variator
from .ops.int8_linear import own_precision
from .runtime import kept
from .runtime.state import State
from .sites.attends import check_attends
from .sites.decoder_refusals import check_decoder
from .sites.families import known
from .sites.family import Family
from .sites.find import find, find_all, is_patched
from .sites.found import parts_of
from .sites.install import install, owners_of, remove, sites_of
from .sites.unchanged import check_attention, check_described, check_unchanged, module_of
from .sites.wrappers import check_present, check_unwrapped

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    families: tuple[Family, ...],
    ratio: Any,
    ratios: Iterable[int] | Mapping[str, Iterable[int]],
    bottleneck: int,
    activation: str,
    placements: Iterable[str] = ("ffn",),
    backend: str = "auto",
    keep_first: int | None = None,
    keep_last: int = 0,
    keep: Iterable[int] | None = None,
    window: int = kept.WINDOW,
    pack: bool = True,
    precision: str | None = None,
    optimize: str | None = None,
    family: Family | None = None,
) -> Model:
    """:func:`patch_t5` for a model of any of ``families``."""
    if isinstance(model, nn.Module) and is_patched(model):
        raise ValueError("model is already patched: use set_ratio(), or unpatch() it first")
    if isinstance(model, nn.Module) and is_projected(model):
        raise ValueError(
            "model must be merged before it is patched, its matrices are still composed of P, W "
            "and A: vk.patch(vk.merge(model))"
        )
    if family is not None:
        if not isinstance(family, Family):
            raise TypeError(f"family must be a vk.Family, got {type(family).__name__}")
        module_of(family)
        families = (family,)
    several = [parts_of(*one) for one in find_all(model, families)]
    every = several if len(several) > 1 else [find(model, families)]
    check_unwrapped(model)
    config, active = configure(
        ratio, ratios, bottleneck, activation, placements, backend, pack, precision, optimize
    )
    for found in every:
        check_present(found.encoder)
        check_decoder(found, config.placements)
        if set(config.placements) - {"ffn"}:
            check_attention(found)
        check_unchanged(found, tuple(config.placements))
        if not known(found.family):
            check_described(found)
    for found in every:
        backends.resolve(config.backend, found.like(0))
    made = []
    for found in every:
        row = found.family
        chosen = kept.configure(
            keep_first, keep_last, keep, row.keep_first, found.vocabulary, window
        )
        method = Variator(config)
        sites = sites_of(found, config.placements)
        state = State(row.name, method, sites, owners_of(found, sites), len(found.layers))
        state.kept = chosen
        state.level = state.check(active)
        modules = {
            i: method.parameters(
                site.placement, found.hidden_size, found.like_at(site), found.at(site).training
            )
            for i, site in state.own_sites
        }
        made.append((found, state, modules))
    for found, state, modules in made:
        install(model, found, state, modules)  # takes off all of the model where it fails
        if not known(found.family) and set(config.placements) - {"ffn"}:
            try:
                with own_precision():
                    check_attends(found, state)
            except BaseException:
                remove(model)
                raise
    return model
