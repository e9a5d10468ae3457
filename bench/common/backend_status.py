"""Which backend an arm's name stands for, and whether it can run here."""

from __future__ import annotations

from variator_kernels import backends

from .compiling import Unavailable


def of(arm: str) -> str:
    """``"reference"`` or ``"cpu"``; raises ``Unavailable`` where the kernels were not built."""
    if arm.startswith("reference"):
        return "reference"
    status = next(s for s in backends.status() if s.name == "cpu")
    if not status.usable:
        raise Unavailable(status.detail)
    return "cpu"
