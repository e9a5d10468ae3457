"""Plugins in files: a folder with safetensors and JSON; the authors' files are read too."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import files, sharding
from .applying import apply
from .hub import located
from .methods.variator import stored
from .methods.variator.stored import FIELDS, Settings, key
from .patching import unpatch
from .plugin_files import FILES, SETTINGS, TENSORS, checked
from .runtime.kept import Kept
from .runtime.site import Site
from .runtime.state import STATE, State, states
from .sites import base_weights
from .sites.family import ROW, Family, is_a
from .sites.find import find, find_all, is_patched
from .sites.found import Found
from .sites.in_place import check_in_place, patched
from .sites.wrappers import NO_VALUES
from .version import __version__


def save_plugins(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the plugins of a patched model to ``plugins.safetensors`` and ``plugins.json``.

    Each file appears whole or not at all; ``folder`` is made if need be. Where FSDP2 shards the
    model every process must call it, and the same holds for :func:`load_plugins`.

    Raises:
        ValueError: the model is not patched, ``folder`` is a file, or plugins are not in this
        process (DeepSpeed's ZeRO stage 3).
    """
    places = folders(model, folder)
    sharding.reshard(model)  # all of it: an encoder alone may be no unit that is sharded
    for encoder, place in places:
        write(*gather(encoder), place)


def folders(model: nn.Module, folder: str | os.PathLike[str]) -> list[tuple[nn.Module, Path]]:
    """Each patched encoder of ``model`` with its folder: ``folder`` itself, or one of the encoder's
    path in ``model`` in it where there are several.

    Raises:
        ValueError: nothing is patched.
    """
    states(model)
    named = [(name, part) for name, part in model.named_modules() if _is_patched_encoder(part)]
    return _places(named, folder)


def _is_patched_encoder(part: nn.Module) -> bool:
    row = getattr(type(part), ROW, None)
    return row is not None and STATE in vars(part) and is_a(part, row, row.encoder)


def _places(
    named: list[tuple[str, nn.Module]], folder: str | os.PathLike[str]
) -> list[tuple[nn.Module, Path]]:
    several = len(named) > 1
    return [(part, Path(folder) / name if several else Path(folder)) for name, part in named]


def gather(
    model: nn.Module, value: Callable[[Tensor], Tensor] = sharding.whole
) -> tuple[Settings, dict[str, Tensor]]:
    """What :func:`write` puts into files, on the CPU; ``value`` of a parameter is all of it."""
    found, state = patched(model)
    config = state.method.config
    settings = Settings(
        state.family,
        found.hidden_size,
        len(found.layers),
        config.bottleneck,
        config.activation,
        {place: list(ratios) for place, ratios in config.placements.items()},
        stored.level_of(state.level, state.sites, len(found.layers)),
        written_by=__version__,
        keep_first=state.kept.first,
        keep_last=state.kept.last,
        keep=state.kept.ids,
        window=state.kept.window,
    )
    sharding.reshard(model)
    settings = settings._replace(base=base_weights.sample(found, value))
    tensors = {}
    for _, site in state.own_sites:
        for k in config.placements[site.placement]:
            for field in FIELDS[site.placement]:
                name = key(site, k, field)
                tensor = value(found.at(site).plugins[str(k)].get_parameter(field))
                if not tensor.numel():
                    raise ValueError(
                        f"model must hold its plugins, {name} is empty: ZeRO stage 3 of DeepSpeed "
                        "is not supported, use stage 2 or FSDP2"
                    )
                if tensor.is_meta:
                    raise ValueError(NO_VALUES.format(name))
                tensors[name] = tensor.detach().cpu().contiguous()
    return settings._replace(untrained=_untrained(state, tensors)), tensors


def _untrained(state: State, tensors: dict[str, Tensor]) -> dict[str, dict[str, list[int]]]:
    """As :class:`Settings` has it."""
    found: dict[str, dict[str, list[int]]] = {}
    for number, site in state.own_sites:
        for k in state.method.placements[site.placement]:
            if (number, k) not in state.fitted and stored.is_initial(tensors, site, k):
                found.setdefault(site.placement, {}).setdefault(str(k), []).append(site.layer)
    return found


def write(settings: Settings, tensors: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Both files of a folder."""
    text = json.dumps(settings._asdict(), indent=2) + "\n"
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"folder must be a folder, got the file {path}")
    path.mkdir(parents=True, exist_ok=True)
    # The settings travel in both files, so that halves of two saves are told apart.
    files.replace(path / TENSORS, lambda to: save_file(tensors, to, {"settings": text}))
    files.replace(path / SETTINGS, lambda to: Path(to).write_text(text, encoding="utf-8"))


def load_plugins(
    model: nn.Module, source: str | os.PathLike[str], *, family: Family | None = None
) -> None:
    """Read plugins into a patched model, or patch it as the file says and read them.

    Tensors take the dtype and device of the model's. A patched model keeps its active ratio, and
    plugins of ratios that the file does not have. Which tokens stay whole is as the file says (none
    in version 0.1.0's and the authors'), for all ratios.

    Args:
        model: patched or not. Of several encoders (a bi-encoder's) each takes its plugins from the
            folder of its name in ``source``.
        source: a folder that :func:`save_plugins` wrote (also version 0.1.0's), or a patched
            model's ``save_pretrained``; its ``plugins.safetensors``; the hub id of such a
            folder, ``"owner/name"``; or a file of the authors' (a torch pickle with one ratio; only
            tensors are read from it).
        family: of an unpatched model outside of the table, as :func:`patch` takes it.

    Raises:
        FileNotFoundError: there is no such file. ValueError: the file is damaged or of a newer
        version, its plugins are not this model's, or they keep other tokens whole than the model
        was patched to keep; nothing has changed then.

    Warns:
        UserWarning: the model has other weights than the one whose plugins were saved.
    """
    families = None if family is None else (family,)
    source = located(source, FILES)
    named = _encoders(model, families)
    if len(named) < 2:
        one = named[0][1] if named and is_patched(named[0][1]) else model
        content = checked(find(one, families), source)
        sharding.reshard(model)
        _fill(one, *content)
        return
    contents = [checked(find(part, families), place) for part, place in _places(named, source)]
    sharding.reshard(model)
    made: list[nn.Module] = []
    try:
        for (_, part), content in zip(named, contents, strict=True):
            if not is_patched(part):
                made.append(part)
            _fill(part, *content)
    except BaseException:
        for part in made:
            if is_patched(part):
                unpatch(part)
        raise


def _encoders(model: nn.Module, families: tuple[Family, ...] | None) -> list[tuple[str, nn.Module]]:
    """By their names in ``model``: those that are patched, or all if none is."""
    wanted = {id(encoder) for _, encoder in find_all(model, families)}
    named = [(name, part) for name, part in model.named_modules() if id(part) in wanted]
    return [pair for pair in named if _is_patched_encoder(pair[1])] or named


def _fill(
    model: nn.Module, found: Found, settings: Settings, tensors: dict[str, Tensor], kept: Kept
) -> None:
    if not is_patched(model):
        apply(
            model,
            (found.family,),
            {
                place: {i: k for i, k in layers.items() if found.has(Site(place, i))}
                for place, layers in settings.active.items()
            },
            settings.placements,
            settings.bottleneck,
            settings.activation,
        )
    sharding.reshard(model)
    state: State = vars(found.encoder)[STATE]
    check_in_place(found, state)
    left = stored.untrained(settings, tensors, [site for _, site in state.own_sites])
    with torch.no_grad():
        for number, site in state.own_sites:
            for k in settings.placements.get(site.placement, ()):
                for field in FIELDS[site.placement]:
                    parameter = found.at(site).plugins[str(k)].get_parameter(field)
                    sharding.fill(parameter, tensors[key(site, k, field)])
                (state.fitted.discard if (site, k) in left else state.fitted.add)((number, k))
                state.quiet.discard((number, k))
    state.kept = kept
    state.looked_at = None
    state.warned = False
