"""A plan as JSON: its fields, a format number, and the version that wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .. import files
from ..version import __version__
from .site import PLACEMENTS, Site

FORMAT = 1
NUMBERS = ("limit", "predicted_cost", "cost", "loss")
FIELDS = ("format", "written_by", "asked", "measure", *NUMBERS, "level")


def text_of(fields: Mapping[str, Any]) -> str:
    """What a file holds, from a plan's fields: its ratios by layers by placements."""
    level: dict[str, dict[str, int]] = {}
    for site, ratio in zip(fields["sites"], fields["ratios"], strict=True):
        level.setdefault(site.placement, {})[str(site.layer)] = ratio
    values = {"format": FORMAT, "written_by": __version__, "level": level, **fields}
    return json.dumps({name: values[name] for name in FIELDS}, indent=1) + "\n"


def fields_of(text: str) -> dict[str, Any]:
    """The fields of the plan in a file, whose numbers are floats; their values are not checked.

    Raises:
        ValueError: it is no JSON, lacks a field, or has one that this version does not know.
        RecursionError: it is too deep.
    """
    given = files.parsed(text)
    if not isinstance(given, dict):
        raise ValueError(f"it must hold a mapping, got {type(given).__name__}")
    number, unknown = given.get("format"), sorted(given.keys() - set(FIELDS))
    if type(number) is not int or number != FORMAT or unknown:
        what = f"fields {unknown}" if unknown else f"format {number!r}"
        raise ValueError(
            f"it has {what}, this version reads format {FORMAT}: it was written by "
            f"variator_kernels {given.get('written_by', 'of an unknown version')}, use that "
            "version or a newer one"
        )
    if missing := [name for name in FIELDS if name not in given]:
        raise ValueError(f"it lacks the fields {missing}")
    if not isinstance(given["written_by"], str):
        raise ValueError(f"written_by must be a version, got {given['written_by']!r}")
    for name in ("asked", "measure"):
        if not isinstance(given[name], str):
            raise ValueError(f"{name} must be a word, got {given[name]!r}")
    for name in NUMBERS:
        if type(given[name]) is int and abs(given[name]) < 2**53:
            given[name] = float(given[name])
    level = given.pop("level")
    del given["format"], given["written_by"]
    return given | _sites(level)


def _sites(level: Any) -> dict[str, Any]:
    found: list[tuple[Site, int]] = []
    if not isinstance(level, dict) or not set(level) <= set(PLACEMENTS):
        raise ValueError(f"level must be of placements among {PLACEMENTS}, got {level!r}")
    for place, layers in level.items():
        if not isinstance(layers, dict) or not layers:
            raise ValueError(f"level must have ratios of layers, got {layers!r}")
        for layer, ratio in layers.items():
            if not (layer.isascii() and layer.isdigit() and layer == str(int(layer))):
                raise ValueError(f"level must name layers by numbers, got {layer!r}")
            if type(ratio) is not int:
                raise ValueError(f"level must hold integers >= 1, got {ratio!r}")
            found.append((Site(place, int(layer)), ratio))
    # A model's order, whatever that of the mappings: they may have been sorted by names.
    found.sort(key=lambda pair: (PLACEMENTS.index(pair[0].placement), pair[0].layer))
    sites, ratios = zip(*found, strict=True) if found else ((), ())
    return {"sites": sites, "ratios": ratios}
