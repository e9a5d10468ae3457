"""What a model's plugins are: chosen when it is patched, saved with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from ... import backends, checks
from ...ops.feed_forward import ADAPTER_ACTIVATIONS
from ...runtime.level import mentioned

PLACEMENTS = ("ffn",)
DEFAULT_RATIO = 4
"""The active one, where it has plugins."""


class VariatorConfig(NamedTuple):
    """``ratios``: every k that has plugins; ``bottleneck``, ``activation``: r and φ."""

    ratios: tuple[int, ...]
    bottleneck: int = 64
    activation: str = "tanh"
    placements: tuple[str, ...] = PLACEMENTS
    backend: str = "auto"
    pack: bool = True


def configure(
    ratio: Any,
    ratios: Iterable[int],
    bottleneck: int,
    activation: str,
    placements: Iterable[str],
    backend: str,
    pack: bool = True,
) -> tuple[VariatorConfig, Any]:
    """The configuration that these arguments of ``patch`` ask for, and the active ratio.

    Raises:
        ValueError: one does not fit; the message names it.
    """
    active, every = _ratios(ratio, ratios)
    config = VariatorConfig(
        every,
        checks.ratio(bottleneck, "bottleneck"),
        checks.choice(activation, ADAPTER_ACTIVATIONS, "activation"),
        _placements(placements),
        checks.choice(backend, ("auto", *backends.BACKENDS), "backend"),
        checks.flag(pack, "pack"),
    )
    return config, active


def _ratios(ratio: Any, ratios: Iterable[int]) -> tuple[Any, tuple[int, ...]]:
    """The active one, and all."""
    try:
        given = list(ratios)
    except TypeError:
        raise ValueError(f"ratios must be a sequence of integers >= 2, got {ratios!r}") from None
    every = {checks.ratio(k, "ratios", least=2) for k in given}
    if ratio is not None:
        every.update(k for k in map(checks.ratio, mentioned(ratio)) if k > 1)
    if not every:
        raise ValueError("ratios must name at least one ratio >= 2, got ()")
    if ratio is None:
        first = checks.ratio(given[0], "ratios")
        ratio = DEFAULT_RATIO if DEFAULT_RATIO in every else first
    return ratio, tuple(sorted(every))


def _placements(placements: Iterable[str]) -> tuple[str, ...]:
    given = (placements,) if isinstance(placements, str) else tuple(placements)
    if given != PLACEMENTS:
        raise ValueError(f"placements must be {PLACEMENTS} in this version, got {given}")
    return given
