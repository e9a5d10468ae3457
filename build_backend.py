"""setuptools' build backend; where nvcc is, CUTLASS's headers are a build requirement besides."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks of PEP 517)

CUTLASS = "nvidia-cutlass>=4.2,<5"


def _environment() -> ModuleType:
    """variator_kernels/environment.py by itself: importing the package would need PyTorch."""
    path = Path(__file__).with_name("variator_kernels") / "environment.py"
    spec = importlib.util.spec_from_file_location("variator_environment", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = _environment()


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """``cuda/bin/nvcc``, the machine's own choice, then ``cuda-13.0`` before ``cuda-9.2``."""

    def version(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.parts[-3])]

    return sorted(paths, key=lambda path: (not version(path), version(path)), reverse=True)


def why_no_cuda() -> str | None:
    """Why the CUDA kernels are not to be built, or None: their build takes many minutes, so it
    needs a GPU on this machine, or ``VARIATOR_CUDA=1``."""
    wanted = environment.cuda()
    if wanted is False:
        return f"VARIATOR_CUDA={environment.get('VARIATOR_CUDA')}"
    asked = wanted or "cuda" in environment.required_parts() or environment.cuda_architectures()
    if asked or has_gpu():
        return None
    return "no GPU is on this machine (VARIATOR_CUDA=1 builds them all the same)"


def has_gpu() -> bool:
    """Whether NVIDIA's driver shows a device."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def find_nvcc() -> str | None:
    """:func:`any_nvcc`; None if it is not wanted either."""
    return any_nvcc() if why_no_cuda() is None else None


def any_nvcc() -> str | None:
    """nvcc by CUDACXX, CUDA_HOME, PATH or the usual folders; None if nowhere."""
    candidates = [shlex.split(os.environ.get("CUDACXX", "")) or [""]]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            candidates.append([str(Path(home, "bin", "nvcc"))])
    candidates.append(["nvcc"])
    candidates += [[str(path)] for path in newest_first(Path("/usr/local").glob("cuda*/bin/nvcc"))]
    return next((found for name, *_ in candidates if name and (found := shutil.which(name))), None)


def cutlass_headers() -> str | None:
    """The folder with CUTLASS's headers: CUTLASS_PATH, or in the package nvidia-cutlass."""
    folder = os.environ.get("CUTLASS_PATH", "")
    if not folder:
        spec = importlib.util.find_spec("cutlass_library")
        folder = str(Path(spec.origin).parent / "source") if spec and spec.origin else ""
    return folder if Path(folder, "include", "cutlass", "cutlass.h").exists() else None


def needs_cutlass() -> bool:
    return find_nvcc() is not None and not os.environ.get("CUTLASS_PATH")


def get_requires_for_build_wheel(config_settings=None):
    environment.check_build()
    needed = build_meta.get_requires_for_build_wheel(config_settings)
    return [*needed, CUTLASS] if needs_cutlass() else needed


def get_requires_for_build_editable(config_settings=None):
    environment.check_build()
    needed = build_meta.get_requires_for_build_editable(config_settings)
    return [*needed, CUTLASS] if needs_cutlass() else needed
