"""Loads the compiled kernels, once. Missing ones are no error, but a reason."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import torch  # first: the kernels run on its OpenMP threads

from . import environment

_HOW = {
    "cpu": "a C++17 compiler (g++)",
    "cuda": "nvcc and CUTLASS's headers, or VARIATOR_CUDA=1 to ask for them",
}


def build_info() -> dict:
    """What the build recorded, or an empty dict for a source tree that was never built."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _why_absent(part: str) -> str:
    """Why there is no module of ``part`` for this Python, and how to get one."""
    record = build_info().get(part)
    if record is None:
        return (
            f"this source folder was not built, so it has no {part.upper()} kernels "
            "(`pip install -e .` in it builds them)"
        )
    if record["built"]:
        why = f"were built for another Python, and not for {sysconfig.get_config_var('EXT_SUFFIX')}"
    else:
        why = f"were not built: {record['reason']}"
    return (
        f"the {part.upper()} kernels {why}. Installing again with {_HOW[part]} builds them, or "
        f"says why not: VARIATOR_REQUIRE={part} pip install --no-cache-dir --force-reinstall "
        "--no-deps <where it was installed from>"
    )


def _import(part: str) -> tuple[Any, str]:
    """The module of ``part`` and "", or None and the reason.

    It is VARIATOR_<PART>_EXTENSION's, else the one of this folder and no other: an editable install
    of another checkout offers its own for every package of this name.
    """
    name, variable = f"variator_kernels._{part}", f"VARIATOR_{part.upper()}_EXTENSION"
    override = environment.get(variable)
    if override:
        spec = importlib.util.spec_from_file_location(name, override)
        if not Path(override).is_file():
            spec = None
    else:
        spec = importlib.machinery.PathFinder.find_spec(name, [str(Path(__file__).parent)])
    why = ""
    if spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
        try:
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module, ""
        except ImportError as error:
            sys.modules.pop(name, None)
            why = f"the {part.upper()} kernels do not load: {error}"
    if override:
        expected = f"the path of a compiled module {name}"
        raise environment.wrong(variable, f"{expected} ({why})" if why else expected)
    return None, why or _why_absent(part)


def _load_cpu() -> tuple[Any, str]:
    module, why = _import("cpu")
    wanted = environment.choice("VARIATOR_CPU_ISA", environment.INSTRUCTION_SETS)
    if module is not None and wanted:
        if wanted not in (here := module.available_isas()):
            raise environment.wrong(
                "VARIATOR_CPU_ISA",
                f"one of {', '.join(here)} (those that this processor has and the build made)",
            )
        module.set_isa(wanted)
    return module, why


environment.check_import()
if unknown := environment.unknown_names():
    warnings.warn(unknown, stacklevel=2)
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


@torch.compiler.assume_constant_result
def built() -> bool:
    """Whether there are kernels for the CPU; a constant of a graph."""
    return load() is not None
