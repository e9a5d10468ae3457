"""Loads the compiled CPU kernels, once; never fails the import of the package."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (first: the kernels run on torch's own OpenMP threads)

_NAME = "variator_kernels._cpu"


def _load() -> tuple[Any, str]:
    override = os.environ.get("VARIATOR_CPU_EXTENSION")
    try:
        module: ModuleType
        if override:
            spec = importlib.util.spec_from_file_location(_NAME, override)
            if spec is None or spec.loader is None:
                return None, f"VARIATOR_CPU_EXTENSION={override} is not an extension module"
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(_NAME)
    except ImportError as error:
        return None, f"the extension {_NAME} is not built or does not load: {error}"
    wanted = os.environ.get("VARIATOR_CPU_ISA")
    if wanted:
        try:
            module.set_isa(wanted)
        except ValueError as error:
            return None, f"VARIATOR_CPU_ISA: {error}"
    return module, ""


# At import, not at first use: torch.compile traces through load().
_MODULE, _WHY_MISSING = _load()


def load() -> Any:
    """The extension module, or None; :func:`why_missing` then says why."""
    return _MODULE


def why_missing() -> str:
    """Why :func:`load` gives None; empty if it does not."""
    return _WHY_MISSING
