"""What setup.py does when parts cannot be built, and what the built module depends on."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parents[1]
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
    "isa_avx512_bf16.cpp": "",
}
# Mangled names of namespace std (with its short forms such as Ss) and of __gnu_cxx.
STANDARD_LIBRARY = re.compile(r"_Z(T[VTIS])?N?[KVrRO]*(S[tabsiod]|9__gnu_cxx)")


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("variator_kernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the build files with a tiny extension in place of the real one."""
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


def build(tree: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VARIATOR_")}
    kept.pop("LD_PRELOAD", None)  # the sanitizers are no concern of the compiler's
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *args],
        cwd=tree,
        env={**kept, "VARIATOR_CUDA": "0", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def build_info(package: Path) -> dict:
    return json.loads((package / "_build_info.json").read_text())


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


# --- VARIATOR_REQUIRE


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("VARIATOR_REQUIRE", "tpu", "some of cpu, cuda"),
        ("VARIATOR_CUDA", "ture", "one of 1, on, yes, true, 0, off, no, false, auto"),
        ("VARIATOR_CUDA_ARCHS", "75", "GPU architectures from 80 on"),
        ("VARIATOR_SANITIZE", "address", "one of 1, on"),
        ("MAX_JOBS", "many", "an integer >= 1"),
    ],
)
def test_a_wrong_value_fails_the_build_at_its_start(
    tree: Path, name: str, value: str, expected: str
) -> None:
    done = build(tree, "--inplace", **{"CXX": "/nonexistent", name: value})
    assert done.returncode != 0
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: {name} must be {expected}") and line.endswith(f"got {value!r}")
    assert not list(tree.glob("variator_kernels/_*.json"))
    hook = "import build_backend as b; b.get_requires_for_build_wheel()"
    env = {**os.environ, name: value}
    done = subprocess.run(
        [sys.executable, "-c", hook], cwd=tree, env=env, capture_output=True, text=True, check=False
    )
    assert f"ValueError: {name} must be {expected}" in done.stderr


def test_a_name_that_nothing_reads_is_told_of(tree: Path) -> None:
    done = build(tree, "--inplace", CXX="/nonexistent", VARIATOR_CMAKE_ARG="-DA=1")
    assert done.returncode == 0
    assert "reads no VARIATOR_CMAKE_ARG: it has no effect" in done.stderr


@pytest.mark.parametrize("args", ["-DVARIATOR_SANITIZE=maybe", "--no-such-option", "-DA='b"])
def test_wrong_arguments_for_cmake_fail_the_build(tree: Path, args: str) -> None:
    needs("g++")
    done = build(tree, "--inplace", CXX="g++", VARIATOR_CMAKE_ARGS=args)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("error: VARIATOR_CMAKE_ARGS")


def test_required_cuda_fails_the_build(tree: Path) -> None:
    done = build(tree, "--inplace", VARIATOR_REQUIRE="cuda")
    assert done.returncode != 0
    assert "error: VARIATOR_REQUIRE=cuda: VARIATOR_CUDA=0" in done.stderr


def test_cutlass_is_required_only_where_nvcc_is(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import build_backend

    def needs_cutlass() -> bool:
        wanted = build_backend.get_requires_for_build_wheel()
        assert build_backend.get_requires_for_build_editable() == wanted
        return build_backend.CUTLASS in wanted

    monkeypatch.chdir(ROOT)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for name in ("VARIATOR_CUDA_ARCHS", "VARIATOR_REQUIRE", "CUTLASS_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VARIATOR_CUDA", "1")
    assert build_backend.find_nvcc() == str(nvcc) and needs_cutlass()
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    assert not needs_cutlass()
    monkeypatch.delenv("CUTLASS_PATH")
    monkeypatch.setenv("VARIATOR_CUDA", "0")
    assert build_backend.find_nvcc() is None and not needs_cutlass()
    assert build_backend.why_no_cuda() == "VARIATOR_CUDA=0"


@pytest.mark.parametrize(
    ("settings", "gpu", "built"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"VARIATOR_CUDA": "0"}, True, False),
        ({"VARIATOR_CUDA": "1"}, False, True),
        ({"VARIATOR_CUDA_ARCHS": "90a"}, False, True),
        ({"VARIATOR_REQUIRE": "cpu,cuda"}, False, True),
        ({"VARIATOR_REQUIRE": "cpu"}, False, False),
    ],
)
def test_cuda_is_built_where_a_gpu_is_or_it_is_asked_for(
    settings: dict[str, str], gpu: bool, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import build_backend

    for name in ("VARIATOR_CUDA", "VARIATOR_CUDA_ARCHS", "VARIATOR_REQUIRE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build_backend, "has_gpu", lambda: gpu)
    assert (build_backend.why_no_cuda() is None) == built


def test_compiles_as_many_files_at_once_as_it_may(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(setup_py, "container_cpus", lambda: None)
    assert setup_py.parallel_jobs() == 6
    monkeypatch.setattr(setup_py, "container_cpus", lambda: 2)
    assert setup_py.parallel_jobs() == 2
    for name, jobs in zip(reversed(names), (5, 3), strict=True):  # the second is stronger
        monkeypatch.setenv(name, str(jobs))
        assert setup_py.parallel_jobs() == jobs
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(ValueError, match=f"MAX_JOBS must be an integer >= 1, got '{wrong}'"):
            setup_py.parallel_jobs()


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota(
    setup_py: ModuleType, tmp_path: Path, files: dict[str, str], cpus: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert setup_py.container_cpus(str(tmp_path)) == cpus


def test_the_newest_toolkit_is_taken(setup_py: ModuleType) -> None:
    import build_backend

    found = [Path("/usr/local", name, "bin/nvcc") for name in ("cuda-9.2", "cuda", "cuda-13.0")]
    names = [path.parts[-3] for path in build_backend.newest_first(found)]
    assert names == ["cuda", "cuda-13.0", "cuda-9.2"]


def test_no_cutlass_is_a_reason(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(setup_py.NotBuilt, match="nvidia-cutlass"):
        setup_py.find_cutlass()


# --- without a compiler, or with one that fails


def test_no_compiler_installs_plain_python(tree: Path) -> None:
    stale = tree / "out" / "variator_kernels" / "_cpu.old.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    done = build(tree, "--build-lib", "out", CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "not built: no C++ compiler: CXX=/nonexistent was not found" in done.stderr
    info = build_info(tree / "out" / "variator_kernels")
    assert info["cpu"]["built"] is False
    assert "CXX=/nonexistent" in info["cpu"]["reason"]
    assert not stale.exists(), "an extension of an earlier build would be shipped"


def test_no_compiler_on_an_empty_path(tree: Path) -> None:
    done = build(tree, "--inplace", PATH="", CXX="")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in build_info(tree / "variator_kernels")["cpu"]["reason"]


def test_required_cpu_without_a_compiler_fails_the_build(tree: Path) -> None:
    done = build(tree, "--inplace", CXX="/nonexistent", VARIATOR_REQUIRE="cpu")
    assert done.returncode != 0
    assert "error: VARIATOR_REQUIRE=cpu: no C++ compiler" in done.stderr


def test_failed_compilation_is_the_recorded_reason(tree: Path) -> None:
    needs("g++")
    (tree / "csrc" / "cpu" / "isa_portable.cpp").write_text("int kernel() { return oops; }\n")
    (tree / "csrc" / "cpu" / "bindings.cpp").write_text("")
    done = build(tree, "--inplace", CXX="g++")
    assert done.returncode == 0, done.stderr
    reason = build_info(tree / "variator_kernels")["cpu"]["reason"]
    assert reason.startswith(("the compilation failed", "CMake")), reason
    if "compilation" in reason:
        assert "oops" in reason


def test_reason_joins_the_two_lines_of_a_cmake_error(setup_py: ModuleType) -> None:
    log = "-- ok\nCMake Error at CMakeLists.txt:3 (find_package):\n\n  No pybind11.\nmore\n"
    assert setup_py.first_error(log).endswith("(find_package): No pybind11.")
    assert setup_py.first_error("") == "no output"


# --- with a compiler


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
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VARIATOR_")}
    kept.pop("LD_PRELOAD", None)
    shutil.rmtree(tree / "wheels", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-deps", "--no-index", "--wheel-dir", "wheels", "."],
        cwd=tree,
        env={**kept, "VARIATOR_CUDA": "0", **env},
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


# --- the module that is installed


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
