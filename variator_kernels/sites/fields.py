"""Checks of a family's fields."""

from __future__ import annotations

from typing import Any

from ..ops.feed_forward import FFN_ACTIVATIONS

CHOICES = {
    "activation": ("", *FFN_ACTIVATIONS),
    "fused": ("", "in_gate", "gate_in"),
    "norm_kind": ("layer", "rms"),
}


def check_type(name: str, declared: str, value: Any) -> None:
    if declared == "str" and not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {value!r}")
    if "None" in declared and value is None:
        return
    if declared.startswith("bool") and not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    if declared == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise TypeError(f"{name} must be an integer >= 0, got {value!r}")
    if "tuple" in declared and not (
        isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    ):
        raise TypeError(f"{name} must be a tuple of str, got {value!r}")
    if declared == "float" and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
