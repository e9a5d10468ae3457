"""What a controller is given, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .. import checks
from .find_states import found
from .plan import Plan


def highest_ratios(model: nn.Module, levels: Mapping[str, Any]) -> list[int]:
    """Of each level the highest ratio at any site.

    Raises:
        ValueError: the model is not patched, has no plugins for a level, or a level is
            nowhere more and somewhere less compressed than one in front of it.
    """
    states, every = found(model), list[list[int]]()
    for name, level in levels.items():
        ratios = [k for state in states for k in state.check(level).ratios]
        for before, others in zip(levels, every, strict=False):
            if ratios != others and all(
                k <= other for k, other in zip(ratios, others, strict=True)
            ):
                raise ValueError(
                    "levels must go from the least compressed to the most, got "
                    f"{name!r}, which compresses less, behind {before!r}"
                )
        every.append(ratios)
    return [max(ratios) for ratios in every]


def named(levels: Any, default: Iterable[int]) -> dict[str, Any]:
    """Levels by their names, in the order given.

    Raises:
        ValueError: there is none, two have one name, or one that is no ratio has none.
    """
    if isinstance(levels, Mapping):
        pairs = list(levels.items())
    else:
        pairs = []
        for level in default if levels is None else levels:
            if isinstance(level, Plan | Mapping):
                raise ValueError(
                    "levels must be a mapping of names to levels where one is a plan or a "
                    f"mapping, got {type(level).__name__} without a name"
                )
            pairs.append((str(checks.ratio(level, "levels")), level))
    if not pairs or not all(isinstance(name, str) and name for name, _ in pairs):
        raise ValueError(f"levels must name at least one level by words, got {levels!r}")
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"levels must be different, got {[name for name, _ in pairs]}")
    return made


def positive(value: Any, name: str, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:g}, got {value!r}")
    return float(value)
