"""A small tree that setup.py builds in seconds."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tests.install.building import ROOT

MODULE_SOURCE = """
#include <pybind11/pybind11.h>
int kernel();
PYBIND11_MODULE(_cpu, m) { m.def("kernel", &kernel); }
"""
# Enough of csrc for a build; the files of the instruction sets may define nothing.
TINY_SOURCES = {
    "bindings.cpp": MODULE_SOURCE,
    "isa_portable.cpp": "int kernel() { return 42; }\n",
    "isa_avx2.cpp": "",
    "isa_avx512.cpp": "",
    "isa_avx512_vnni.cpp": "",
    "isa_avx512_bf16.cpp": "",
    "isa_amx.cpp": "",
}


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    pytest.importorskip("setuptools", minversion="77")
    spec = importlib.util.spec_from_file_location("variator_kernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the build files with a tiny extension in place of the real one."""
    pytest.importorskip("setuptools", minversion="77")
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("")
    (tmp_path / "variator_kernels").mkdir()
    (tmp_path / "variator_kernels" / "__init__.py").write_text("")
    for name in ("version.py", "environment.py"):
        shutil.copy(ROOT / "variator_kernels" / name, tmp_path / "variator_kernels")
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    for name, text in TINY_SOURCES.items():
        (tmp_path / "csrc" / "cpu" / name).write_text(text)
    return tmp_path
