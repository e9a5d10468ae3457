"""What the build takes from the environment, and what it does when parts cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.install.building import ROOT, build, build_info, needs

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
