"""What is saved of a model's plugins: settings as JSON, tensors by key (formats 1 and 2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ... import checks
from ...ops.feed_forward import ADAPTER_ACTIVATIONS
from ...runtime.kept import MOST, Kept
from ...runtime.level import Level
from ...runtime.site import PLACEMENTS, Site

FORMAT = 2
MOST_LAYERS = 10_000
_MERGE = ("merge.weight", "merge.bias")
_WHOLE = (*_MERGE, "adapter.w1", "adapter.b1", "adapter.w2", "adapter.b2")
FIELDS = {"ffn": _WHOLE, "attention": _WHOLE, "attention_kv": _MERGE}
"""The tensors of a plugin, by placement."""

ZERO_AT_FIRST = (*_MERGE, "adapter.b1", "adapter.w2", "adapter.b2")
"""The tensors that tell a plugin of initial values: all but ``w1``, which is random."""


class Settings(NamedTuple):
    """What ``plugins.json`` holds.

    ``family`` is empty for the authors' files, which do not say. ``placements`` names the ratios
    that have plugins; ``level`` is what was active, a ratio a layer. A field that an older file
    lacks has its default; a field that this version does not know is an error.
    """

    family: str
    hidden_size: int
    layers: int
    bottleneck: int
    activation: str
    placements: dict[str, list[int]]
    level: dict[str, list[int]]
    format: int = FORMAT
    method: str = "variator"
    written_by: str = "0.1.0"
    keep_first: int = 0
    keep_last: int = 0
    keep: tuple[int, ...] = ()
    window: int = 64
    base: dict[str, list[float]] = {}  # noqa: RUF012 (nobody writes into it)
    """Sampled values of the frozen weights by layer (sites/base_weights.py)."""
    untrained: dict[str, dict[str, list[int]]] | None = None
    """By placement and ratio, the layers whose plugins nobody trained or calibrated; None: the
    file does not say."""

    @property
    def kept(self) -> Kept:
        """The tokens that stay whole."""
        return Kept(self.keep_first, self.keep_last, self.keep, self.window)

    @property
    def ratios(self) -> list[int]:
        """Every ratio that has plugins at some site."""
        return sorted({k for ratios in self.placements.values() for k in ratios})

    def sites(self) -> list[Site]:
        """Every site that there may be, in the order of a model's."""
        return [Site(place, i) for place in self.placements for i in range(self.layers)]

    @property
    def active(self) -> dict[str, dict[int, int]]:
        """The level, as ``set_ratio`` takes it."""
        return {place: dict(enumerate(ratios)) for place, ratios in self.level.items()}


_FIRST = (
    "format",
    "family",
    "ratios",
    "ratio",
    "bottleneck",
    "activation",
    "hidden_size",
    "layers",
)
"""The fields of format 1, all of them required."""


def level_of(level: Level, sites: tuple[Site, ...], layers: int) -> dict[str, list[int]]:
    """A level as :class:`Settings` has it: 1 for a layer without a site."""
    found: dict[str, list[int]] = {}
    for site, ratio in zip(sites, level.ratios, strict=True):
        found.setdefault(site.placement, [1] * layers)[site.layer] = ratio
    return found


def read_settings(given: Any) -> Settings:
    """The settings in a parsed ``plugins.json``.

    Raises:
        ValueError: they are not complete, or of a newer version than this one.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"it must hold a mapping, got {type(given).__name__}")
    number = _integer(given.get("format"), "format")
    if number == 1:
        return _first(given)
    unknown = sorted(given.keys() - set(Settings._fields))
    if number != FORMAT or unknown:
        what = f"fields {unknown}" if number == FORMAT else f"format {number!r}"
        writer = given.get("written_by", "an unknown version")
        raise ValueError(
            f"it has {what}, this version reads formats 1 and {FORMAT}: it was written by "
            f"variator_kernels {writer}, use that version or a newer one"
        )
    _require(given, Settings._fields[:7])
    settings = Settings(**given)
    if settings.method != "variator":
        raise ValueError(f"its method must be 'variator', got {settings.method!r}")
    if not isinstance(settings.written_by, str):
        raise ValueError(f"written_by must be a version, got {settings.written_by!r}")
    for name in ("keep_first", "keep_last", "window"):
        checks.integer(_integer(getattr(settings, name), name), name, most=MOST)
    if not isinstance(settings.keep, list | tuple):
        raise ValueError(f"keep must be a list of token ids, got {settings.keep!r}")
    _check_base(settings.base)
    ids = [_integer(token, "keep") for token in settings.keep]
    if len(set(ids)) < len(ids):
        raise ValueError(f"keep must name each token id once, got {ids}")
    settings = _checked(settings._replace(keep=tuple(sorted(ids))))
    _check_untrained(settings)
    return settings


def _check_base(base: Any) -> None:
    rows = base.values() if isinstance(base, dict) else [None]
    for row in rows:
        if not isinstance(row, list) or not all(
            type(x) in (int, float) and math.isfinite(x) for x in row
        ):
            raise ValueError(f"base must hold lists of finite numbers, got {row!r}")


def _check_untrained(settings: Settings) -> None:
    given: Any = settings.untrained
    if given is None:
        return
    for place, by_ratio in given.items() if isinstance(given, dict) else [("", given)]:
        ratios = set(map(str, settings.placements.get(place, ())))
        known = isinstance(by_ratio, dict) and set(by_ratio) <= ratios
        for layers in by_ratio.values() if known else [None]:
            if not isinstance(layers, list) or any(
                type(layer) is not int or not 0 <= layer < settings.layers for layer in layers
            ):
                raise ValueError(
                    f"untrained must hold lists of layers by placement and ratio, got {given!r}"
                )


def _first(given: Mapping[str, Any]) -> Settings:
    """Format 1: one placement, one active ratio, nothing kept."""
    _require(given, _FIRST)
    if unknown := sorted(given.keys() - set(_FIRST)):
        raise ValueError(f"format 1 has no fields {unknown}")
    layers = _integer(given["layers"], "layers", least=1)
    if layers > MOST_LAYERS:
        raise ValueError(f"layers must be at most {MOST_LAYERS}, got {layers}")
    return _checked(
        Settings(
            family=given["family"],
            hidden_size=given["hidden_size"],
            layers=layers,
            bottleneck=given["bottleneck"],
            activation=given["activation"],
            placements={"ffn": given["ratios"]},
            level={"ffn": [given["ratio"]] * layers},
        )
    )


def _require(given: Mapping[str, Any], fields: tuple[str, ...]) -> None:
    if missing := [field for field in fields if field not in given]:
        raise ValueError(f"it lacks the fields {missing}")


def _integer(value: Any, name: str, least: int = 0) -> int:
    """What JSON writes as an integer; 1.0 and true would be others of Python's numbers."""
    if type(value) is not int:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return checks.ratio(value, name, least)


def _checked(settings: Settings) -> Settings:
    if not isinstance(settings.family, str) or not settings.family:
        raise ValueError(f"family must be a model_type, got {settings.family!r}")
    for name in ("placements", "level"):
        value = getattr(settings, name)
        known = isinstance(value, dict) and set(value) <= set(PLACEMENTS)
        if not known or not value or {"attention", "attention_kv"} <= set(value):
            raise ValueError(f"{name} must be of placements among {PLACEMENTS}, got {value!r}")
        for ratios in value.values():
            if not isinstance(ratios, list) or not ratios:
                raise ValueError(f"{name} must hold a list of ratios, got {ratios!r}")
    if tuple(settings.placements) != tuple(settings.level):
        raise ValueError(
            f"level must be of the placements {tuple(settings.placements)}, got "
            f"{tuple(settings.level)}"
        )
    for name in ("hidden_size", "layers", "bottleneck"):
        _integer(getattr(settings, name), name, least=1)
    checks.choice(settings.activation, ADAPTER_ACTIVATIONS, "activation")
    for place, level in settings.level.items():
        ratios = [_integer(k, "ratios", least=2) for k in settings.placements[place]]
        if len(set(ratios)) < len(ratios):
            raise ValueError(f"placements must name each ratio once, got {ratios}")
        if len(level) != settings.layers:
            raise ValueError(f"level must have {settings.layers} layers, got {level}")
        for ratio in level:
            if _integer(ratio, "level", least=1) not in (1, *ratios):
                raise ValueError(f"level must hold ratios that have plugins, {ratios}, got {ratio}")
    return settings


def key(site: Site, ratio: int, field: str) -> str:
    """The name of a tensor in the file."""
    return f"{site.placement}.{site.layer}.{ratio}.{field}"


def is_initial(tensors: Mapping[str, Tensor], site: Site, ratio: int) -> bool:
    """Whether a plugin in a file has the values that it starts with."""
    fields = [field for field in FIELDS[site.placement] if field in ZERO_AT_FIRST]
    return not any(bool(tensors[key(site, ratio, field)].any()) for field in fields)


def untrained(
    settings: Settings, tensors: Mapping[str, Tensor], sites: Iterable[Site]
) -> set[tuple[Site, int]]:
    """Of ``sites``, of modules of their own, the plugins that nobody trained, with their ratios.

    A file that does not say may be of calibration, which leaves initial values where none are
    better: one plugin of others speaks for all of its placement and ratio.
    """
    found: set[tuple[Site, int]] = set()
    for place, ratios in settings.placements.items():
        own = [site for site in sites if site.placement == place]
        for k in ratios:
            if settings.untrained is not None:
                named = settings.untrained.get(place, {}).get(str(k), ())
                found |= {(site, k) for site in own if site.layer in named}
            elif all(is_initial(tensors, site, k) for site in own):
                found |= {(site, k) for site in own}
    return found


def first_key(layer: int, ratio: int, field: str) -> str:
    """The same in format 1."""
    return f"layer.{layer}.ratio.{ratio}.{field}"


def renamed(settings: Settings, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a folder of format 1 under the names of this format; others stay as they are."""
    names = {
        first_key(site.layer, k, field): key(site, k, field)
        for site in settings.sites()
        for k in settings.ratios
        for field in FIELDS["ffn"]
    }
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def shapes(settings: Settings, sites: Iterable[Site]) -> dict[str, tuple[int, ...]]:
    """Every tensor that plugins of these settings have at ``sites`` (a shared module is one)."""
    d, r = settings.hidden_size, settings.bottleneck
    found: dict[str, tuple[int, ...]] = {}
    for site in sites:
        for k in settings.placements[site.placement]:
            every = (k, k * d), (k,), (r, 2 * d), (r,), (d, r), (d,)
            sizes = dict(zip(_WHOLE, every, strict=True))
            found |= {key(site, k, field): sizes[field] for field in FIELDS[site.placement]}
    return found
