"""Which implementation runs an op: ``reference``, ``cpu``; ``triton`` and ``cuda`` later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from . import extension

BACKENDS = ("reference", "cpu")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Status(NamedTuple):
    """Whether a backend can run here: ``detail`` says what it uses, or why it cannot."""

    name: str
    usable: bool
    detail: str


def status() -> list[Status]:
    """Every backend of this package and whether it is usable in this process."""
    cpu = extension.load()
    if cpu is None:
        cpu_status = Status("cpu", False, extension.why_missing())
    else:
        found = ", ".join(cpu.available_isas())
        cpu_status = Status("cpu", True, f"instruction set {cpu.active_isa()} (of {found})")
    return [Status("reference", True, "plain PyTorch, any device"), cpu_status]


def build_info() -> dict:
    """What the build recorded, or an empty dict for a source tree that was never built."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


def resolve(backend: str, x: torch.Tensor) -> str:
    """The backend that runs an op on ``x``.

    ``"auto"`` takes the fastest that is proven on the device and falls back to the reference;
    an explicit choice that cannot run raises ``ValueError`` and says why.
    """
    if backend == "reference":
        return backend
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    reason = _why_not_cpu(x)
    if reason is None:
        return "cpu"
    if backend == "auto":
        return "reference"
    raise ValueError(f"backend 'cpu' cannot run here: {reason}")


def _why_not_cpu(x: torch.Tensor) -> str | None:
    if x.device.type not in ("cpu", "meta"):
        return f"the input is on device {x.device}, expected cpu"
    if x.dtype not in CPU_DTYPES:
        return f"the input's dtype is {x.dtype}, expected one of {CPU_DTYPES}"
    if extension.load() is None:
        return extension.why_missing()
    return None
