"""setuptools' build backend; where nvcc is, CUTLASS's headers are a build requirement besides."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks of PEP 517)

CUTLASS = "nvidia-cutlass>=4.2,<5"


def switched_on(name: str, default: str = "") -> bool:
    return os.environ.get(name, default).strip().lower() not in ("", "0", "off", "no", "false")


def find_nvcc() -> str | None:
    """nvcc by CUDACXX, CUDA_HOME, PATH or the usual folders; None if nowhere or not wanted."""
    if not switched_on("VARIATOR_CUDA", "auto"):
        return None
    candidates = [shlex.split(os.environ.get("CUDACXX", "")) or [""]]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            candidates.append([str(Path(home, "bin", "nvcc"))])
    candidates.append(["nvcc"])
    folders = Path("/usr/local").glob("cuda*/bin/nvcc")
    candidates += [[str(path)] for path in sorted(folders, key=str, reverse=True)]
    return next((found for name, *_ in candidates if name and (found := shutil.which(name))), None)


def get_requires_for_build_wheel(config_settings=None):
    needed = build_meta.get_requires_for_build_wheel(config_settings)
    return [*needed, CUTLASS] if find_nvcc() else needed


def get_requires_for_build_editable(config_settings=None):
    needed = build_meta.get_requires_for_build_editable(config_settings)
    return [*needed, CUTLASS] if find_nvcc() else needed
