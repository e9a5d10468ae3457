"""Checks at the public edge: an error names the argument, what came, what was expected."""

from __future__ import annotations

import operator

from torch import Tensor


def ratio(value: object, name: str = "ratio", least: int = 1) -> int:
    """An integer compression ratio of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, float) and value.is_integer():
            return ratio(int(value), name, least)
        if hasattr(value, "__index__") and not isinstance(value, (bool, Tensor)):
            return ratio(operator.index(value), name, least)  # NumPy's integers
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value


def flag(value: object, name: str) -> bool:
    """True or False, and nothing that is taken for one."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def integer(value: object, name: str, least: int = 0, most: int | None = None) -> int:
    """An integer from ``least`` to ``most``; NumPy's too, but neither True nor 1.0."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    number = operator.index(value)  # type: ignore[arg-type]
    if number < least:
        raise ValueError(f"{name} must be >= {least}, got {number}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be <= {most}, got {number}")
    return number


def choice(value: str, allowed: tuple[str, ...], name: str) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value
