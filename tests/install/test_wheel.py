"""What a build with a compiler leaves in the sources, and what wheels are called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.install.building import ROOT, build, build_info, environment, needs


def test_build_records_what_it_did(tree: Path) -> None:
    needs("g++")
    pytest.importorskip("pybind11")
    done = build(tree, "--inplace", CXX="g++", VARIATOR_REQUIRE="cpu")
    if "Could NOT find Python" in done.stdout:
        pytest.skip("the headers of Python are not installed")
    assert done.returncode == 0, done.stdout + done.stderr
    package = tree / "variator_kernels"
    info = build_info(package)
    assert info["cpu"]["built"] is True and "portable" in info["cpu"]["isa"]
    assert info["compiler"].startswith("GNU ")
    assert len(list(package.glob("_cpu*.so"))) == 1
    # A later build that fails leaves no extension of this one behind.
    build(tree, "--inplace", CXX="/nonexistent")
    assert not list(package.glob("_cpu*.so"))


def test_builds_for_other_pythons_stay_in_the_sources(tree: Path) -> None:
    """Several environments may install one checkout with -e."""
    needs("g++")
    pytest.importorskip("pybind11")
    package = tree / "variator_kernels"
    own = package / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    other = package / "_cpu.cpython-399-x86_64-linux-gnu.so"
    for file in (own, other):
        file.write_text("of an earlier build")
    build(tree, "--inplace", CXX="/nonexistent")
    assert other.exists() and not own.exists()
    done = build(tree, "--inplace", CXX="g++")
    if own.exists():
        assert own.stat().st_size > 1000
    else:
        assert "Could NOT find Python" in done.stdout
    assert other.read_text() == "of an earlier build"


def wheel(tree: Path, **env: str) -> tuple[str, set[str]]:
    """The name and the files of the wheel that pip makes of a tree."""
    shutil.rmtree(tree / "wheels", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-deps", "--no-index", "--wheel-dir", "wheels", "."],
        cwd=tree,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (tree / "wheels").iterdir()
    with zipfile.ZipFile(made) as archive:
        return made.name, set(archive.namelist())


def test_a_wheel_without_kernels_is_marked(tree: Path) -> None:
    """By its name: pip must never take it for one with kernels, nor the other way round."""
    needs("g++")
    pytest.importorskip("pip")
    pytest.importorskip("pybind11")
    record, module = "variator_kernels/_build_info.json", "variator_kernels/_cpu"
    name, files = wheel(tree, CXX="g++")
    if not any(file.startswith(module) for file in files):
        pytest.skip("the headers of Python are not installed")
    assert name.endswith(f"-cp{sys.version_info[0]}{sys.version_info[1]}-{name.split('-', 4)[4]}")
    assert "none-any" not in name and record in files
    name, files = wheel(tree, CXX="/nonexistent")
    assert name.endswith("-py3-none-any.whl")
    assert record in files and "variator_kernels/version.py" in files
    assert not [file for file in files if file.endswith(".so") or ".data/" in file]


def test_make_builds_again_when_something_else_is_asked_for(tmp_path: Path) -> None:
    needs("make")
    stamp = tmp_path / ".stamp-asked"
    compiler = tmp_path / "bin" / "clang++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)

    def changed(*arguments: str, **env: str) -> bool:
        before = stamp.read_text() if stamp.exists() else None
        inherited = {
            name: value for name, value in os.environ.items() if name != "VARIATOR_REQUIRE"
        }
        subprocess.run(
            ["make", f"VENV={tmp_path}", str(stamp), *arguments],
            cwd=ROOT, env=inherited | env, check=True,
        )  # fmt: skip
        return stamp.read_text() != before

    assert changed() and not changed()
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "VARIATOR_CMAKE_ARGS", "VARIATOR_SANITIZE",
                 "VARIATOR_CUDA", "VARIATOR_CUDA_ARCHS", "VARIATOR_REQUIRE", "CUDACXX",
                 "CUTLASS_PATH", "CMAKE_BUILD_TYPE"):  # fmt: skip
        value = "-DX='a b'"
        assert changed(**{name: value}) and not changed(**{name: value}), name
        assert not changed(f"{name}={value}"), "a command line says the same"
        assert changed(), name
    assert changed(PATH=f"{compiler.parent}:{os.environ['PATH']}")
