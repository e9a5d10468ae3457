"""Plugins in files: our own format, and the authors' released ones."""

from __future__ import annotations

import json
import os
import pickle
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import checks, sharding
from .patching import apply
from .runtime.ratio import STATE, PluginState, states
from .sites.find import Found, find, is_patched

FORMAT = 1
TENSORS, SETTINGS = "plugins.safetensors", "plugins.json"
_FIELDS = ("merge.weight", "merge.bias", "adapter.w1", "adapter.b1", "adapter.w2", "adapter.b2")
_RELEASED = re.compile(
    r"(?:^|\.)mux_layer\.(\d+)\.(mux_layer|demux_adapter\.w_in|demux_adapter\.w_out)\.(weight|bias)$"
)
_RELEASED_FIELDS = {
    ("mux_layer", "weight"): "merge.weight",
    ("mux_layer", "bias"): "merge.bias",
    ("demux_adapter.w_in", "weight"): "adapter.w1",
    ("demux_adapter.w_in", "bias"): "adapter.b1",
    ("demux_adapter.w_out", "weight"): "adapter.w2",
    ("demux_adapter.w_out", "bias"): "adapter.b2",
}


class Settings(NamedTuple):
    """What ``plugins.json`` holds. ``family`` is empty for the authors' files, which do not say."""

    format: int
    family: str
    ratios: list[int]
    ratio: int
    bottleneck: int
    activation: str
    hidden_size: int
    layers: int


def save_plugins(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the plugins of a patched model to ``plugins.safetensors`` and ``plugins.json``.

    Each file appears whole or not at all; ``folder`` is made if need be. Where FSDP2 shards the
    model every process must call it, and the same holds for :func:`load_plugins`.

    Raises:
        ValueError: the model is not patched, ``folder`` is a file, or plugins are not in this
        process (DeepSpeed's ZeRO stage 3).
    """
    write(*gather(model), folder)


def gather(model: nn.Module) -> tuple[Settings, dict[str, Tensor]]:
    """What :func:`write` puts into files, on the CPU."""
    states(model)
    found = find(model)
    state: PluginState = vars(found.encoder)[STATE]
    settings = Settings(
        FORMAT,
        state.family,
        list(state.ratios),
        state.ratio,
        state.bottleneck,
        state.activation,
        found.hidden_size,
        len(found.layers),
    )
    sharding.reshard(model)
    tensors = {}
    for i, layer in enumerate(found.layers):
        for k in state.ratios:
            for field in _FIELDS:
                tensor = sharding.whole(layer.plugins[str(k)].get_parameter(field))
                if not tensor.numel():
                    raise ValueError(
                        f"model must hold its plugins, {_key(i, k, field)} is empty: ZeRO stage 3 "
                        "of DeepSpeed is not supported, use stage 2 or FSDP2"
                    )
                tensors[_key(i, k, field)] = tensor.detach().cpu().contiguous()
    return settings, tensors


def write(settings: Settings, tensors: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Both files of a folder."""
    text = json.dumps(settings._asdict(), indent=2) + "\n"
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"folder must be a folder, got the file {path}")
    path.mkdir(parents=True, exist_ok=True)
    # The settings travel in both files, so that halves of two saves are told apart.
    _replace(path / TENSORS, lambda to: save_file(tensors, to, {"settings": text}))
    _replace(path / SETTINGS, lambda to: Path(to).write_text(text, encoding="utf-8"))


def load_plugins(model: nn.Module, source: str | os.PathLike[str]) -> None:
    """Read plugins into a patched model, or patch it as the file says and read them.

    Tensors take the dtype and device of the model's. A patched model keeps its active ratio, and
    plugins of ratios that the file does not have.

    Args:
        source: a folder that :func:`save_plugins` wrote, its ``plugins.safetensors``, or a file
            of the authors' (a torch pickle with one ratio; only tensors are read from it).

    Raises:
        FileNotFoundError: there is no such file. ValueError: the file is damaged, or its plugins
        are not this model's; nothing has changed then.
    """
    found = find(model)
    path = Path(source)
    path = path / TENSORS if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"source must hold plugins, there is no file {path}")
    if path.suffix == ".json":
        raise ValueError(f"source must be the folder of plugins or its {TENSORS}, got {path}")
    read = _read_own if path.suffix == ".safetensors" else _read_released
    settings, tensors = read(path)
    _check(found, settings, tensors, path)
    if not is_patched(model):
        apply(
            model,
            (found.family,),
            settings.ratio,
            settings.ratios,
            settings.bottleneck,
            settings.activation,
        )
    sharding.reshard(model)
    with torch.no_grad():
        for i, layer in enumerate(found.layers):
            for k in settings.ratios:
                for field in _FIELDS:
                    parameter = layer.plugins[str(k)].get_parameter(field)
                    sharding.fill(parameter, tensors[_key(i, k, field)])
    state: PluginState = vars(found.encoder)[STATE]
    state.trained.clear()
    state.warned = False


def _key(layer: int, ratio: int, field: str) -> str:
    return f"layer.{layer}.ratio.{ratio}.{field}"


def _replace(path: Path, writer: Callable[[Path], Any]) -> None:
    """Write to a temporary file beside ``path``, then rename."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        writer(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_own(path: Path) -> tuple[Settings, dict[str, Tensor]]:
    beside = path.with_name(SETTINGS)
    if not beside.is_file():
        raise FileNotFoundError(f"source must hold {SETTINGS} beside {path.name}, there is none")
    try:
        with safe_open(path, framework="pt") as file:
            inside = json.loads((file.metadata() or {})["settings"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        given = json.loads(beside.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"source {path.parent} is damaged: {error}") from error
    if given != inside:
        raise ValueError(f"source {path.parent} is damaged: {SETTINGS} belongs to other tensors")
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        found = given.get("format") if isinstance(given, dict) else given
        raise ValueError(f"source must have format {FORMAT}, got {found!r}")
    try:
        return Settings(**given), tensors
    except TypeError as error:
        raise ValueError(f"source {path.parent} is damaged: {error}") from error


def _read_released(path: Path) -> tuple[Settings, dict[str, Tensor]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # Not torch's own words: they advise to load without protection.
        raise ValueError(
            f"source {path} is not a file of tensors: expected a folder that save_plugins wrote, "
            "or the authors' plugin file"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"source {path} must hold a dict, got {type(content).__name__}")
    parts: dict[tuple[int, str], Tensor] = {}
    for name, tensor in content.items():
        match = _RELEASED.search(str(name))
        if match is None:
            raise ValueError(f"source {path} has an unexpected key {name!r}")
        slot = int(match[1]), _RELEASED_FIELDS[match[2], match[3]]
        if slot in parts:
            raise ValueError(f"source {path} has {name!r} under two prefixes")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        parts[slot] = tensor
    merge, w1 = parts.get((0, "merge.weight")), parts.get((0, "adapter.w1"))
    if merge is None or w1 is None or merge.dim() != 2 or w1.dim() != 2 or not merge.shape[0]:
        raise ValueError(f"source {path} lacks the weights mux_layer and w_in of layer 0")
    k, r, layers = merge.shape[0], w1.shape[0], 1 + max(i for i, _ in parts)
    d = merge.shape[1] // k
    for i in range(layers):
        for field, size in (("merge.bias", k), ("adapter.b1", r), ("adapter.b2", d)):
            parts.setdefault((i, field), torch.zeros(size))
    tensors = {_key(i, k, field): tensor for (i, field), tensor in parts.items()}
    return Settings(FORMAT, "", [k], k, r, "tanh", d, layers), tensors


def _check(found: Found, settings: Settings, tensors: dict[str, Tensor], path: Path) -> None:
    """The plugins are this model's, complete and well-shaped."""
    d, layers = found.hidden_size, len(found.layers)
    state: PluginState | None = vars(found.encoder).get(STATE)
    wanted: list[tuple[str, Any, Any]] = [
        ("hidden size", d, settings.hidden_size),
        ("number of layers", layers, settings.layers),
    ]
    if settings.family:
        wanted.append(("family", found.family.name, settings.family))
    if state is not None:
        wanted.append(("bottleneck", state.bottleneck, settings.bottleneck))
        if settings.family:
            wanted.append(("activation", state.activation, settings.activation))
    for what, expected, got in wanted:
        if expected != got:
            raise ValueError(f"source {path} has {what} {got!r}, the model has {expected!r}")
    try:
        ratios = [checks.ratio(k, "ratios", least=2) for k in settings.ratios]
        checks.ratio(settings.ratio)
        r = checks.ratio(settings.bottleneck, "bottleneck")
        checks.choice(settings.activation, checks.ADAPTER_ACTIVATIONS, "activation")
    except (TypeError, ValueError) as error:
        raise ValueError(f"source {path} is damaged: {error}") from error
    if state is not None and not set(ratios) <= set(state.ratios):
        raise ValueError(
            f"source {path} has ratios {ratios}, the model has plugins for {state.ratios}: "
            "patch it with ratios= that hold them"
        )
    shapes = {
        _key(i, k, field): shape
        for i in range(layers)
        for k in ratios
        for field, shape in zip(
            _FIELDS, ((k, k * d), (k,), (r, 2 * d), (r,), (d, r), (d,)), strict=True
        )
    }
    if tensors.keys() != shapes.keys():
        missing = sorted(shapes.keys() - tensors.keys())
        unexpected = sorted(tensors.keys() - shapes.keys())
        raise ValueError(
            f"source {path} has missing keys {missing[:4]} and unexpected keys {unexpected[:4]}"
        )
    for key, shape in shapes.items():
        checks.shape(tensors[key], shape, key)
        if not tensors[key].is_floating_point():
            raise ValueError(f"{key} must be floating point, got {tensors[key].dtype}")
