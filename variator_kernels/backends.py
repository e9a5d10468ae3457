"""Which implementation runs an op: ``reference``, ``cpu``, ``triton``, ``cuda``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from . import cuda_support, environment, extension

BACKENDS = ("reference", "cpu", "triton", "cuda")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Status(NamedTuple):
    """Whether a backend can run here: ``detail`` says what it uses, or why it cannot."""

    name: str
    usable: bool
    detail: str


# Triton by the names under which PyTorch's builds bring it, and the oldest that will do.
_TRITON_PACKAGES = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")
_TRITON_LEAST = (3, 6)


def _triton_version() -> str | None:
    for name in _TRITON_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _why_no_triton(version: str | None) -> str | None:
    """Why this version of Triton will not do, or None."""
    least = ".".join(map(str, _TRITON_LEAST))
    if version is None:
        return f"Triton is not installed, {least} or newer is needed"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < _TRITON_LEAST:
        return f"Triton {version} is installed, {least} or newer is needed"
    return None


# Read at import: torch.compile traces through resolve().
_TRITON = _triton_version()
_WHY_NO_TRITON = _why_no_triton(_TRITON)
_INTERPRETER = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")
_NO_CPU_KERNELS = extension.load() is None
# A row is a backend on a GPU architecture: its tests and its report passed there. From how many
# tokens on it is the fastest of those proven there says `from_tokens`, 0 if it is not given; of
# rows with one number the faster stands first. A backend has a row for each range that it wins.
_PROVEN: list[dict] = json.loads(Path(__file__).with_name("proven.json").read_text())


def _check_required() -> None:
    """VARIATOR_REQUIRE holds at import too: a wheel from a cache was built without it.

    Raises:
        ImportError: a part that it names cannot run here.
    """
    why_not = {"cpu": extension.why_missing("cpu"), "cuda": cuda_support.why_not_here() or ""}
    missing = [
        f"VARIATOR_REQUIRE={part}: {why_not[part]}"
        for part in environment.required_parts()
        if why_not[part]
    ]
    if missing:
        raise ImportError("; ".join(missing))


_check_required()


def proven_on(backend: str) -> list[str]:
    """The GPU architectures on which a backend's tests and report passed, as committed."""
    return list(dict.fromkeys(row["arch"] for row in _PROVEN if row["backend"] == backend))


def status() -> list[Status]:
    """Every backend of this package and whether it is usable in this process."""
    cpu = extension.load()
    if cpu is None:
        cpu_status = Status("cpu", False, extension.why_missing())
    else:
        found = ", ".join(cpu.available_isas())
        cpu_status = Status("cpu", True, f"instruction set {cpu.active_isa()} (of {found})")
    return [
        Status("reference", True, "plain PyTorch, any device"),
        cpu_status,
        _triton_status(),
        _cuda_status(),
    ]


def _experience(backend: str) -> str:
    if proven := proven_on(backend):
        return f"ran on {', '.join(proven)}; 'auto' picks it there"
    return "compiled ahead of time, never run on a GPU: 'auto' does not pick it"


def _triton_status() -> Status:
    experience = _experience("triton")
    if _WHY_NO_TRITON is not None:
        return Status("triton", False, f"{_WHY_NO_TRITON} ({experience})")
    if _INTERPRETER:
        return Status("triton", True, f"Triton {_TRITON}, interpreted on the CPU ({experience})")
    if not torch.cuda.is_available():
        return Status("triton", False, f"PyTorch sees no GPU ({experience})")
    return Status(
        "triton", True, f"Triton {_TRITON}, {torch.cuda.get_device_name()} ({experience})"
    )


def _cuda_status() -> Status:
    usable, detail = cuda_support.describe()
    return Status("cuda", usable, f"{detail} ({_experience('cuda')})")


def resolve(
    backend: str, x: torch.Tensor, *, double: bool = False, among: tuple[str, ...] = BACKENDS
) -> str:
    """The backend that runs an op on ``x``; ``double``: its Triton kernels know float64;
    ``among``: those that the op has kernels for.

    ``"auto"`` takes the fastest that is proven on the device and falls back to the reference;
    an explicit choice that cannot run raises ``ValueError`` and says why.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        if _why_not_cpu(x) is None:
            return "cpu"
        for proven in _proven_for(x):
            if proven in among and _why_not(proven, x, double) is None:
                return proven
        # Of a weight, `patch` asks before the model is where it will run.
        on_cpu = x.device.type == "cpu" and not isinstance(x, torch.nn.Parameter)
        if _NO_CPU_KERNELS and on_cpu and x.dtype in CPU_DTYPES:
            _warn_of_the_slow_way()
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    reason = _why_not(backend, x, double)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run here: {reason}")
    return backend


# Dynamo runs it while it traces, and compiles nothing of it.
@torch.compiler.assume_constant_result
def _warn_of_the_slow_way() -> bool:
    """Says once in a process that inputs on the CPU run without kernels."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "inputs on the CPU run on plain PyTorch (backend 'reference'), which is slower: "
            f'{extension.why_missing()}. backend="reference" asks for it without this warning',
            UserWarning,
            stacklevel=2,
        )
    return True


_warned = False


def _proven_for(x: torch.Tensor) -> list[str]:
    """The backends that are proven on the GPU of ``x``, the fastest first."""
    if x.device.type != "cuda" or not _PROVEN:
        return []
    properties = torch.cuda.get_device_properties(x.device)
    arch = f"sm_{properties.major}{properties.minor}"
    return _in_order([row for row in _PROVEN if row["arch"] == arch], x)


def _in_order(rows: list[dict], x: torch.Tensor) -> list[str]:
    """The rows' backends: first that of the greatest size that ``x`` reaches."""
    reached = _reached(rows, x)
    first = [max(reached, key=_from_tokens)] if reached else []  # of equals the first
    return list(dict.fromkeys([row["backend"] for row in [*first, *rows]]))


def sizes_reached(x: torch.Tensor) -> int:
    """What of the number of tokens of ``x`` decides about ``"auto"``: with this number, the device
    and the dtype as they were, it takes the same backend."""
    return len(_reached(_PROVEN, x)) if _PROVEN else 0


def _reached(rows: list[dict], x: torch.Tensor) -> list[dict]:
    """The rows that hold from the tokens of ``x`` on, or from fewer."""
    if not any(map(_from_tokens, rows)):
        return rows[:]  # sizes are not looked at: a compiler would make a graph for each side
    if isinstance(x, torch.nn.Parameter) or len(x.shape) < 2:
        return []  # a weight has no tokens; the file's order holds
    tokens = x.numel() // max(x.shape[-1], 1)
    return [row for row in rows if _from_tokens(row) <= tokens]


def _from_tokens(row: dict) -> int:
    return int(row.get("from_tokens", 0))


def _why_not_cpu(x: torch.Tensor) -> str | None:
    if x.device.type not in ("cpu", "meta"):
        return f"the input is on device {x.device}, expected cpu"
    if x.dtype not in CPU_DTYPES:
        return f"the input's dtype is {x.dtype}, expected one of {CPU_DTYPES}"
    if extension.load() is None:
        return extension.why_missing()
    return None


def _why_not_triton(x: torch.Tensor) -> str | None:
    if x.device.type != "cuda" and not _INTERPRETER:
        return f"the input is on device {x.device}, expected cuda"
    if x.dtype not in GPU_DTYPES:
        return f"the input's dtype is {x.dtype}, expected one of {GPU_DTYPES}"
    return _WHY_NO_TRITON


def _why_not(backend: str, x: torch.Tensor, double: bool) -> str | None:
    """Why a backend cannot run on ``x``, or None."""
    if double and backend == "triton" and x.dtype == torch.float64:
        return _why_not_triton(x.new_empty(0, dtype=torch.float32))
    return _WHY_NOT[backend](x)


_WHY_NOT = {"cpu": _why_not_cpu, "triton": _why_not_triton, "cuda": cuda_support.why_not}
