"""A projected model's P, A and the rest in files: ``projected.safetensors`` and ``.json``. The
frozen W are the original's, which is needed to read them again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ... import files
from ...sites.layout import layout_of
from ...version import __version__
from . import originals, project_model, sizes
from .assemble import Builder, Factors
from .project_model import Projection
from .sizes import Sizes

TENSORS, SETTINGS = "projected.safetensors", "projected.json"
FORMAT = 1
_PART = "parametrizations.weight"


def save(small: Any, folder: str | Path) -> None:
    """Write what is trained of ``small`` into ``folder``; each file appears whole or not at all.

    Raises:
        ValueError: ``small`` has no projections. FloatingPointError: a value is not finite.
    """
    made = project_model.check_projected(small, "small")
    tensors = {name: p.detach().cpu().contiguous() for name, p in small.named_parameters()}
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise FloatingPointError(f"{name} is not finite: nothing was written")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"format": FORMAT, "version": __version__, "class": type(small).__name__}
    settings |= {"projection": asdict(made), "frozen": originals.sampled(small)}
    text = json.dumps(settings, indent=1) + "\n"
    files.replace(folder / TENSORS, lambda path: save_file(tensors, path))
    files.replace(folder / SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors.

    Raises:
        FileNotFoundError: there are none. ValueError: another format.
    """
    folder = Path(folder)
    for name in (SETTINGS, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder must hold {SETTINGS} and {TENSORS}, {folder} has none")
    settings = files.parsed((folder / SETTINGS).read_text(encoding="utf-8"))
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{folder / SETTINGS} must have format {FORMAT}, got {settings.get('format')!r}"
        )
    with safe_open(folder / TENSORS, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return settings, tensors


@torch.no_grad()
def load(small: Any, folder: str | Path) -> None:
    """Give ``small`` the values that :func:`save` wrote of a model like it.

    Raises:
        FileNotFoundError, ValueError: there are none, or of a model of other sizes or another
        original; ``small`` has its old values.
    """
    settings, tensors = read(folder)
    own = dict(small.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if shapes != found:
        wrong = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
        raise ValueError(
            f"{folder} must hold the values of this model, {wrong[0]} has shape "
            f"{found.get(wrong[0])} there and {shapes.get(wrong[0])} here"
        )
    if "frozen" in settings:  # older files have none
        originals.check(small, settings["frozen"], str(folder))
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


@torch.no_grad()
def rebuild(model: Any, folder: str | Path) -> Any:
    """The projected model that :func:`save` wrote, of the original ``model``.

    Raises:
        FileNotFoundError, ValueError: the files are missing, or of another model: of other sizes,
        or other values in the matrices that are projected.
    """
    settings, tensors = read(folder)
    fields = settings["projection"]
    made = Projection(
        **fields | {"sizes": Sizes(*fields["sizes"]), "original": Sizes(*fields["original"])}
    )
    layout = layout_of(model)
    wanted = settings["class"], tuple(made.original)
    got = type(model).__name__, tuple(sizes.sizes_of(model, layout))
    if wanted != got:
        raise ValueError(
            f"model must have the class and the hidden and FFN size that {folder} says, {wanted}, "
            f"got {got}"
        )
    builder = Builder(model, layout, made.sizes, made.untied)
    for name in list(layout.roles):
        path, _, leaf = name.rpartition(".")
        if name not in builder.left:
            continue  # shares one that is there already
        if leaf == "weight" and len(layout.roles[name]) == 2:
            parts = (f"{path}.{_PART}.0.p_in", f"{path}.{_PART}.0.p_out")
            builder.matrix(path, Factors(*(tensors.get(part) for part in parts)))
        else:
            builder.left.discard(name)
    small = builder.finish()
    load(small, folder)
    project_model.mark(small, made)
    return small
