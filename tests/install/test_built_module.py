"""What the built module depends on, and what its objects hold."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.install.building import ROOT, build_info, needs

# Mangled names of namespace std (with its short forms such as Ss) and of __gnu_cxx.
STANDARD_LIBRARY = re.compile(r"_Z(T[VTIS])?N?[KVrRO]*(S[tabsiod]|9__gnu_cxx)")


@pytest.fixture(scope="module")
def built_module() -> Path:
    spec = importlib.util.find_spec("variator_kernels")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [file for folder in folders for file in Path(folder).glob("_cpu*.so")]
    if not found:
        pytest.skip("the extension is not built")
    if build_info(found[0].parent)["cpu"].get("sanitized"):
        pytest.skip("the extension is built with the sanitizers")
    return found[0]


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    """The object files of the newest build here."""
    found = ROOT.glob("build/cmake-*/build_report.json")
    reports = [file for file in found if json.loads(file.read_text()).get("sanitized") is False]
    if not reports:
        pytest.skip("no build folder: the extension was not built from this checkout")
    newest = max(reports, key=lambda file: file.stat().st_mtime).parent
    return sorted(newest.glob("CMakeFiles/_cpu.dir/**/*.o"))


def output_of(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


def test_module_needs_no_torch(built_module: Path) -> None:
    needs("readelf", "nm")
    dynamic = output_of("readelf", "--dynamic", "--wide", built_module)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    system = r"lib(gomp|omp|stdc\+\+|c\+\+|gcc_s|m|c|pthread)\.so(\.\d+)*|ld-linux.*"
    assert [name for name in needed if not re.fullmatch(system, name)] == []
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    undefined = output_of("nm", "--dynamic", "--undefined-only", built_module)
    assert not re.search(r"_ZNK?(2at|3c10|5torch)", undefined)


def test_module_runs_on_gccs_openmp_by_its_bare_name(built_module: Path) -> None:
    needs("readelf")
    if not build_info(built_module.parent)["compiler"].startswith("GNU"):
        pytest.skip("not built with GCC")
    dynamic = output_of("readelf", "--dynamic", "--wide", built_module)
    assert "[libgomp.so.1]" in dynamic


def weak_symbols(file: Path) -> set[str]:
    """Functions that the linker may take from this object or from any other that has them."""
    lines = output_of("nm", "--defined-only", file).splitlines()
    return {name for _, kind, name in (line.split(maxsplit=2) for line in lines) if kind == "W"}


def test_no_instruction_set_leaks_into_shared_functions(objects: list[Path]) -> None:
    """Of a function that several objects hold, the linker keeps one copy for all of them.

    A copy compiled for AVX-512 would then run on every processor.
    """
    needs("nm")
    isa = [file for file in objects if re.match(r"isa_(?!portable)", file.name)]
    if not isa:
        pytest.skip("no instruction set but the portable one was built")
    for file in isa:
        weak = weak_symbols(file)
        from_std = sorted(name for name in weak if STANDARD_LIBRARY.match(name))
        assert from_std == [], f"{file.name} holds functions of the standard library"
        for other in objects:
            if other != file:
                shared = sorted(weak & weak_symbols(other))
                assert shared == [], f"{file.name} and {other.name} share functions"
