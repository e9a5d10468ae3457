"""A level: which ratio holds at each site of a model. It is what is switched at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .. import checks
from .plan import Plan
from .site import Site


class Level(NamedTuple):
    """A ratio for every site, in the order of the model's sites; 1 is dense."""

    ratios: tuple[int, ...]

    @property
    def is_dense(self) -> bool:
        return all(ratio == 1 for ratio in self.ratios)

    @property
    def uniform(self) -> int | None:
        """The one ratio of all sites, or None if they differ."""
        return self.ratios[0] if len(set(self.ratios)) == 1 else None


def resolve(
    value: Any,
    sites: tuple[Site, ...],
    available: Mapping[str, tuple[int, ...]],
    owners: tuple[int, ...] = (),
) -> Level:
    """The level that ``value`` asks for.

    Args:
        value: an integer for every site; a mapping of placements to ratios, ``{"ffn": 4}``, or to
            ratios of layers, ``{"ffn": {-2: 4, -1: 4}}``: layers and placements that are not named
            are dense, negative layers count from the end. Or a :class:`Plan` of these very sites,
            or a :class:`Level`.
        sites: those of the model.
        available: the ratios that have plugins, by placement.
        owners: for each site the first that is the same module; by default all differ.

    Raises:
        ValueError: an entry is none of these, a plan is for other sites, or sites that are one
            module would differ.
    """
    level = _resolve(value, sites, available)
    for site, owner in enumerate(owners):
        ratio, other = level.ratios[site], level.ratios[owner]
        if ratio != other:
            raise ValueError(
                f"ratio must be the same in layers {sites[owner].layer} and {sites[site].layer}, "
                f"which are one module, got {other} and {ratio}"
            )
    return level


def _resolve(
    value: Any, sites: tuple[Site, ...], available: Mapping[str, tuple[int, ...]]
) -> Level:
    if isinstance(value, Plan):
        value.check_sites(sites)
        value = Level(value.ratios)
    if isinstance(value, Level):
        if len(value.ratios) != len(sites):
            raise ValueError(
                f"ratio must be a level of {len(sites)} sites, got one of {len(value.ratios)}"
            )
        pairs = zip(sites, value.ratios, strict=True)
        return Level(tuple(_ratio(k, site.placement, available, "ratio") for site, k in pairs))
    if not isinstance(value, Mapping):
        return Level(tuple(_ratio(value, site.placement, available, "ratio") for site in sites))
    known = tuple(dict.fromkeys(site.placement for site in sites))
    chosen: dict[Site, int] = {}
    for placement, entry in value.items():
        if placement not in known:
            raise ValueError(f"ratio must name placements of the model, {known}, got {placement!r}")
        name = f"ratio[{placement!r}]"
        layers = [site.layer for site in sites if site.placement == placement]
        if not isinstance(entry, Mapping):
            entry = dict.fromkeys(layers, entry)
        for layer, ratio in entry.items():
            at = Site(placement, _layer(layer, layers, name))
            if at in chosen:
                raise ValueError(f"{name} must name a layer once, got {layer} for {at.layer} again")
            chosen[at] = _ratio(ratio, placement, available, name)
    return Level(tuple(chosen.get(site, 1) for site in sites))


def mentioned(value: Any) -> list[Any]:
    """Every ratio that a request for a level names, as it is given."""
    if isinstance(value, Level | Plan):
        return list(value.ratios)
    if isinstance(value, Mapping):
        return [ratio for entry in value.values() for ratio in mentioned(entry)]
    return [value]


def by_placement(value: Any) -> Mapping[str, Any] | None:
    """What a request for a level says of each placement that it names; None: it names none."""
    if isinstance(value, Plan):
        return value.by_placement
    return value if isinstance(value, Mapping) else None


def _ratio(
    value: object, placement: str, available: Mapping[str, tuple[int, ...]], name: str
) -> int:
    ratio = checks.ratio(value, name)
    if ratio != 1 and ratio not in available[placement]:
        where = f" for {placement!r}" if len(available) > 1 else ""
        raise ValueError(
            f"{name} must be 1 (dense) or one that has plugins{where}, {available[placement]}, "
            f"got {ratio}"
        )
    return ratio


def _layer(value: object, layers: list[int], name: str) -> int:
    count = len(layers)
    if layers != list(range(count)):  # some layers have no site: their numbers are as in the model
        if isinstance(value, bool) or value not in layers:
            raise ValueError(f"{name} must name layers among {layers}, got {value!r}")
        return layers[layers.index(value)]  # type: ignore[arg-type]
    if isinstance(value, bool) or not isinstance(value, int) or not -count <= value < count:
        raise ValueError(
            f"{name} must name layers as integers from {-count} to {count - 1}, got {value!r}"
        )
    return value % count
