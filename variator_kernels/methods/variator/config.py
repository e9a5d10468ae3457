"""What a model's plugins are: chosen when it is patched, saved with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ... import backends, checks
from ...ops.feed_forward import ADAPTER_ACTIVATIONS
from ...ops.int8_linear import PRECISIONS
from ...runtime.level import by_placement, mentioned
from ...runtime.site import PLACEMENTS

OPTIMIZE = ("sublayers", "encoder")
"""Whose frozen products run packed at dense levels too."""
DEFAULT_RATIO = 4
"""The active one, where it has plugins."""


class VariatorConfig(NamedTuple):
    """``placements``: every k that has plugins, by placement; ``bottleneck``, ``activation``: r, φ
    (of ``attention_kv``, which has no adapter, neither)."""

    placements: dict[str, tuple[int, ...]]
    bottleneck: int = 64
    activation: str = "tanh"
    backend: str = "auto"
    pack: bool = True
    precision: str | None = None
    optimize: str | None = None


def configure(
    ratio: Any,
    ratios: Any,
    bottleneck: int,
    activation: str,
    placements: Iterable[str],
    backend: str,
    pack: bool = True,
    precision: str | None = None,
    optimize: str | None = None,
) -> tuple[VariatorConfig, Any]:
    """The configuration that these arguments of ``patch`` ask for, and the active ratio.

    Raises:
        ValueError: one does not fit; the message names it.
    """
    places = _placements(placements, ratio, ratios)
    active, every = _ratios(ratio, ratios, places)
    config = VariatorConfig(
        every,
        checks.ratio(bottleneck, "bottleneck"),
        checks.choice(activation, ADAPTER_ACTIVATIONS, "activation"),
        checks.choice(backend, ("auto", *backends.BACKENDS), "backend"),
        checks.flag(pack, "pack"),
        _precision(precision, pack, backend),
        _optimize(optimize, pack),
    )
    return config, active


def _precision(precision: str | None, pack: bool, backend: str) -> str | None:
    if precision is None:
        return None
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be None or one of {PRECISIONS}, got {precision!r}")
    if not pack:
        raise ValueError(
            f"pack must be True with precision={precision!r}, whose weights are packed copies"
        )
    if backend not in ("auto", "cpu"):
        raise ValueError(
            f"backend must be 'auto' or 'cpu' with precision={precision!r}, which only CPU kernels "
            f"have, got {backend!r}"
        )
    return precision


def _optimize(optimize: str | None, pack: bool) -> str | None:
    if optimize is None:
        return None
    checks.choice(optimize, OPTIMIZE, "optimize")
    if not pack:
        raise ValueError(
            f"pack must be True with optimize={optimize!r}, which multiplies with packed copies"
        )
    return optimize


def _ratios(ratio: Any, ratios: Any, places: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """The active level, and every ratio of each placement."""
    given = {place: _given(ratios, place) for place in places}
    every = {place: set(numbers) for place, numbers in given.items()}
    active = by_placement(ratio)
    for place in places:
        named = ratio if active is None else active.get(place, ())
        if ratio is not None and named != ():
            every[place].update(k for k in map(checks.ratio, mentioned(named)) if k > 1)
        if not every[place]:
            where = f" for {place!r}" if len(places) > 1 else ""
            raise ValueError(f"ratios must name at least one ratio >= 2{where}, got ()")
    if ratio is None:
        first = {p: DEFAULT_RATIO if DEFAULT_RATIO in every[p] else given[p][0] for p in places}
        ratio = first if len(set(first.values())) > 1 else next(iter(first.values()))
    return ratio, {place: tuple(sorted(numbers)) for place, numbers in every.items()}


def _given(ratios: Any, place: str) -> list[int]:
    """Those that ``ratios`` names for a placement."""
    named = ratios.get(place, ()) if isinstance(ratios, Mapping) else ratios
    try:
        given = list(named)
    except TypeError:
        raise ValueError(f"ratios must be a sequence of integers >= 2, got {ratios!r}") from None
    return [checks.ratio(k, "ratios", least=2) for k in given]


def _placements(placements: Iterable[str], ratio: Any, ratios: Any) -> tuple[str, ...]:
    """Those of the argument, or those that mappings of ratios imply."""
    given = (placements,) if isinstance(placements, str) else tuple(placements)
    named = [place for value in (ratio, ratios) for place in by_placement(value) or ()]
    for place in (*given, *named):
        if place not in PLACEMENTS:
            raise ValueError(f"placements must be among {PLACEMENTS}, got {place!r}")
    if named and given == ("ffn",):  # the default
        given = tuple(named)
    elif not set(named) <= set(given):
        raise ValueError(
            f"placements must hold those that ratio and ratios name, {sorted(set(named))}, got "
            f"{given}"
        )
    if not given:
        raise ValueError(f"placements must name at least one of {PLACEMENTS}, got ()")
    if {"attention", "attention_kv"} <= set(given):
        raise ValueError(
            "placements must not hold both 'attention' and 'attention_kv', which work at the same "
            f"sublayers, got {given}"
        )
    return tuple(place for place in PLACEMENTS if place in given)
