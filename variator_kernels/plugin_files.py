"""Reading plugin files, and whether they are a model's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import files, sharding
from .methods.variator import released, stored
from .methods.variator.stored import Settings
from .ops import checks
from .runtime.kept import Kept, adopted, token_ids
from .runtime.state import STATE, State
from .sites import base_weights
from .sites.found import Found
from .sites.install import owners_of
from .sites.unchanged import check_attention
from .sites.wrappers import check_values

FILES = TENSORS, SETTINGS = "plugins.safetensors", "plugins.json"
Checked = tuple[Found, Settings, dict[str, Tensor], Kept]


def checked(found: Found, source: str | os.PathLike[str]) -> Checked:
    """What is in ``source``, which fits; nothing has changed yet."""
    path = Path(source)
    path = path / TENSORS if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"source must hold plugins (a folder, its {TENSORS}, a hub id), there is no file {path}"
        )
    if path.suffix == ".json":
        raise ValueError(f"source must be the folder of plugins or its {TENSORS}, got {path}")
    read = _read if path.suffix == ".safetensors" else released.read
    settings, tensors = read(path)
    kept = _check(found, settings, tensors, path)
    check_values(found.encoder)
    _compare_weights(found, settings, path)
    return found, settings, tensors, kept


def _read(path: Path) -> tuple[Settings, dict[str, Tensor]]:
    beside = path.with_name(SETTINGS)
    if not beside.is_file():
        raise FileNotFoundError(f"source must hold {SETTINGS} beside {path.name}, there is none")
    try:
        with safe_open(path, framework="pt") as file:
            inside = files.parsed((file.metadata() or {})["settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        given = files.parsed(beside.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"source {path.parent} is damaged: {error}") from error
    if given != inside:
        raise ValueError(f"source {path.parent} is damaged: {SETTINGS} belongs to other tensors")
    try:
        settings = stored.read_settings(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"source {path.parent} cannot be read: {error}") from error
    return settings, stored.renamed(settings, tensors) if given["format"] == 1 else tensors


def _check(found: Found, settings: Settings, tensors: dict[str, Tensor], path: Path) -> Kept:
    """The plugins are this model's, complete and well-shaped. Returns what is kept with them."""
    state: State | None = vars(found.encoder).get(STATE)
    wanted: list[tuple[str, Any, Any]] = [
        ("hidden size", found.hidden_size, settings.hidden_size),
        ("number of layers", len(found.layers), settings.layers),
    ]
    if settings.family:
        wanted.append(("family", found.family.name, settings.family))
    if state is not None:
        config = state.method.config
        wanted.append(("bottleneck", config.bottleneck, settings.bottleneck))
        if settings.family:
            wanted.append(("activation", config.activation, settings.activation))
    for what, expected, got in wanted:
        if expected != got:
            raise ValueError(f"source {path} has {what} {got!r}, the model has {expected!r}")
    if state is not None:
        _check_ratios(state.method.placements, settings, path)
    elif set(settings.placements) - {"ffn"}:
        check_attention(found)
    token_ids(settings.keep, found.vocabulary)
    kept = settings.kept if state is None else adopted(state.kept, settings.kept, path)
    sites = tuple(filter(found.has, settings.sites()))
    own = [site for i, site in enumerate(sites) if owners_of(found, sites)[i] == i]
    shapes = stored.shapes(settings, own)
    if tensors.keys() != shapes.keys():
        missing = sorted(shapes.keys() - tensors.keys())
        unexpected = sorted(tensors.keys() - shapes.keys())
        raise ValueError(
            f"source {path} has missing keys {missing[:4]} and unexpected keys {unexpected[:4]}"
        )
    for name, shape in shapes.items():
        checks.shape(tensors[name], shape, name)
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensors[name].dtype}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    return kept


def _compare_weights(found: Found, settings: Settings, path: Path) -> None:
    if not settings.base:
        return
    ours = base_weights.sample(found, sharding.whole)
    apart = base_weights.difference(ours, settings.base)
    if apart > base_weights.SAME:
        warnings.warn(
            f"source {path} has plugins of a model with other weights (sampled ones differ by "
            f"{apart:.1%}): plugins reproduce the weights that they were trained on. Measure what "
            "is lost, or calibrate or train them on this model",
            stacklevel=4,
        )


def _check_ratios(present: Mapping[str, tuple[int, ...]], settings: Settings, path: Path) -> None:
    """The model has plugins for all that a file holds."""
    for place, ratios in settings.placements.items():
        where = "" if place == "ffn" else f" for {place!r}"
        if place not in present:
            raise ValueError(
                f"source {path} has plugins for the placement {place!r}, the model was patched for "
                f"{tuple(present)}: patch it with placements= that hold it"
            )
        if not set(ratios) <= set(present[place]):
            raise ValueError(
                f"source {path} has ratios {ratios}{where}, the model has plugins for "
                f"{present[place]}: patch it with ratios= that hold them"
            )
