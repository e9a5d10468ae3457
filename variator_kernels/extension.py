"""Loads the compiled kernels, once; never fails the import of the package."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (first: the kernels run on torch's own OpenMP threads)


def _import(part: str) -> tuple[Any, str]:
    name, variable = f"variator_kernels._{part}", f"VARIATOR_{part.upper()}_EXTENSION"
    override = os.environ.get(variable)
    try:
        if not override:
            return importlib.import_module(name), ""
        spec = importlib.util.spec_from_file_location(name, override)
        if spec is None or spec.loader is None:
            return None, f"{variable}={override} is not an extension module"
        module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, ""
    except ImportError as error:
        return None, f"the extension {name} is not built or does not load: {error}"


def _load_cpu() -> tuple[Any, str]:
    module, why = _import("cpu")
    wanted = os.environ.get("VARIATOR_CPU_ISA")
    if module is not None and wanted:
        try:
            module.set_isa(wanted)
        except ValueError as error:
            return None, f"VARIATOR_CPU_ISA: {error}"
    return module, why


# At import, not at first use: torch.compile traces through load().
_LOADED = {"cpu": _load_cpu(), "cuda": _import("cuda")}


def load(part: str = "cpu") -> Any:
    """The extension module of ``"cpu"`` or ``"cuda"``, or None; :func:`why_missing` says why."""
    return _LOADED[part][0]


@functools.cache
def enum_value(part: str, kind: str, name: str) -> int:
    """The number that the kernels of ``part`` give a name of one of csrc/enums.h's enumerations.

    Raises:
        ValueError: they know no such name.
    """
    values = getattr(load(part), kind)
    if name not in values:
        raise ValueError(f"{kind} of the {part} kernels are {sorted(values)}, got {name!r}")
    return values[name]


def why_missing(part: str = "cpu") -> str:
    """Why :func:`load` gives None; empty if it does not."""
    return _LOADED[part][1]
