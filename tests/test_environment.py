"""Environment variables: a wrong value is an error that names it; missing kernels are told of."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops import cases
from variator_kernels import environment

ROOT = Path(__file__).parents[1]
NO_COMPILER = {"built": False, "reason": "no C++ compiler: g++ was not found"}
RECORD = {"cpu": NO_COMPILER, "cuda": {"built": False, "reason": "nvcc was not found"}}


@pytest.fixture
def clean(monkeypatch):
    """No variable of ours is set."""
    for name in list(os.environ):
        if name.startswith("VARIATOR_"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture(scope="module")
def without_kernels(tmp_path_factory) -> Path:
    """A folder with the package as it is installed where nothing could be built."""
    folder = tmp_path_factory.mktemp("installed")
    package = folder / "variator_kernels"
    shutil.copytree(
        ROOT / "variator_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (package / "_build_info.json").write_text(json.dumps(RECORD))
    return folder


def python(folder: Path, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VARIATOR_")}
    kept.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=kept | {"TRITON_INTERPRET": "0"} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- values, by their text


def test_every_variable_that_is_read_is_known():
    """In the sources: what looks like a variable of the environment stands in the list."""
    files = [ROOT / "setup.py", ROOT / "build_backend.py", *ROOT.glob("csrc/**/*.cpp")]
    files += (ROOT / "variator_kernels").rglob("*.py")
    read = set()
    for file in files:
        quoted = r"""(?:get|getenv|choice|switch|positive|environ\[)\(?["'](VARIATOR_\w+)["']"""
        read |= set(re.findall(quoted, file.read_text()))
    read |= {f"VARIATOR_{part.upper()}_EXTENSION" for part in environment.PARTS}
    assert read <= set(environment.NAMES)


def test_instruction_sets_are_those_of_the_sources():
    files = {file.stem.removeprefix("isa_") for file in (ROOT / "csrc/cpu").glob("isa_*.cpp")}
    assert set(environment.INSTRUCTION_SETS) == files
    assert set(cases.ISAS) <= files


WRONG = [
    ("VARIATOR_REQUIRE", "cpu,tpu", "some of cpu, cuda"),
    ("VARIATOR_REQUIRE", "cpu cuda", "some of cpu, cuda"),
    ("VARIATOR_CUDA", "ture", "one of 1, on, yes, true, 0, off, no, false, auto"),
    ("VARIATOR_CUDA", "2", "one of 1, on"),
    ("VARIATOR_SANITIZE", "address", "one of 1, on"),
    ("VARIATOR_SANITIZE", "auto", "one of 1, on"),
    ("VARIATOR_CUDA_ARCHS", "hopper", "GPU architectures from 80 on"),
    ("VARIATOR_CUDA_ARCHS", "80;75", "GPU architectures from 80 on"),
    ("VARIATOR_CUDA_ARCHS", "9.0", "GPU architectures from 80 on"),
    ("VARIATOR_CUDA_ARCHS", "native", "GPU architectures from 80 on"),
    ("VARIATOR_CMAKE_ARGS", "-DA='b", "arguments as a shell splits them"),
    ("MAX_JOBS", "0", "an integer >= 1"),
    ("MAX_JOBS", "²", "an integer >= 1"),
    ("CMAKE_BUILD_PARALLEL_LEVEL", "many", "an integer >= 1"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_wrong_values_for_the_build(clean, name, value, expected):
    clean.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{name} must be {expected}.*got {value!r}$"):
        environment.check_build()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VARIATOR_CPU_ISA", "avx-512"),
        ("VARIATOR_CPU_ISA", "avx512,avx2"),
        ("VARIATOR_EMULATION_ORDER", "backwards"),
        ("VARIATOR_REQUIRE", "triton"),
    ],
)
def test_wrong_values_for_the_import(clean, name, value):
    clean.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value!r}$"):
        environment.check_import()


def test_right_values(clean):
    environment.check_build()
    environment.check_import()
    assert environment.required_parts() == [] and environment.cuda() is None
    assert environment.unknown_names() == ""
    for value, on in [("", None), ("auto", None), (" ON ", True), ("no", False), ("True", True)]:
        clean.setenv("VARIATOR_CUDA", value)
        assert environment.cuda() is on
    for value, archs in [("", ""), ("80 90a", "80;90a"), ("sm_90a, 100f-real", "sm_90a;100f-real")]:
        clean.setenv("VARIATOR_CUDA_ARCHS", value)
        assert environment.cuda_architectures() == archs
    clean.setenv("VARIATOR_REQUIRE", " CPU , cuda,")
    assert environment.required_parts() == ["cpu", "cuda"]
    clean.setenv("VARIATOR_CPU_ISA", " AVX2 ")
    environment.check_import()


def test_a_name_that_nothing_reads(clean):
    clean.setenv("VARIATOR_ISA", "avx2")
    assert "reads no VARIATOR_ISA" in environment.unknown_names()
    assert "VARIATOR_CPU_ISA" in environment.unknown_names()


# --- at import


WRONG_AT_IMPORT = [
    (
        "VARIATOR_CPU_ISA",
        "avx3",
        "one of portable, avx2, avx512, avx512_vnni, avx512_bf16, amx, got 'avx3'",
    ),
    ("VARIATOR_CPU_EXTENSION", "/no/such.so", "the path of a compiled module"),
    ("VARIATOR_CUDA_EXTENSION", str(ROOT / "setup.py"), "the path of a compiled module"),
    ("VARIATOR_REQUIRE", "gpu", "some of cpu, cuda, separated by commas, got 'gpu'"),
]
# One process for all: most of its time is the import of PyTorch.
REFUSED = """
import os, sys
for name, value in VALUES:
    os.environ[name] = value
    try:
        import variator_kernels
        print("imported with", name)
    except ValueError as error:
        print(error)
    del os.environ[name]
    for module in [module for module in sys.modules if module.startswith("variator_kernels")]:
        del sys.modules[module]
"""


def test_wrong_values_stop_the_import(without_kernels):
    values = [(name, value) for name, value, _ in WRONG_AT_IMPORT]
    done = python(without_kernels, REFUSED.replace("VALUES", repr(values)))
    assert done.returncode == 0, done.stderr
    for line, (name, value, expected) in zip(
        done.stdout.splitlines(), WRONG_AT_IMPORT, strict=True
    ):
        assert line.startswith(f"{name} must be {expected}") and repr(value) in line


@cases.needs_cpu
def test_an_instruction_set_that_is_not_here(monkeypatch):
    """Known to the build, but not to the processor."""
    from variator_kernels import extension

    class Older:
        @staticmethod
        def available_isas():
            return ["portable", "avx2"]

    monkeypatch.setattr(extension, "_import", lambda part: (Older, ""))
    monkeypatch.setenv("VARIATOR_CPU_ISA", "avx512")
    with pytest.raises(ValueError, match=r"VARIATOR_CPU_ISA must be one of portable, avx2 .*'avx5"):
        extension._load_cpu()


AGAIN = """
import os
try:
    import variator_kernels
except ImportError as error:
    print(error)
os.environ["VARIATOR_REQUIRE"] = ""
import variator_kernels
"""


def test_what_is_required_must_be_there_at_import(without_kernels):
    done = python(without_kernels, AGAIN, VARIATOR_REQUIRE="cpu,cuda")
    assert done.returncode == 0, done.stderr  # and the refusal left nothing half-imported
    assert f"VARIATOR_REQUIRE=cpu: the CPU kernels were not built: {NO_COMPILER['reason']}." in (
        done.stdout
    )
    assert "VARIATOR_REQUIRE=cuda: the CUDA kernels were not built: nvcc was not found." in (
        done.stdout
    )


def test_required_cuda_needs_a_driver(monkeypatch):
    from variator_kernels import backends, cuda_support

    monkeypatch.setattr(cuda_support, "_WHY_NO_LAUNCH", None)
    monkeypatch.setattr(cuda_support, "EMULATED", False)
    monkeypatch.setattr(cuda_support, "_driver_version", lambda: 0)
    monkeypatch.setenv("VARIATOR_REQUIRE", "cuda")
    with pytest.raises(ImportError, match=r"VARIATOR_REQUIRE=cuda: NVIDIA's driver .* not found"):
        backends._check_required()
    monkeypatch.setattr(cuda_support, "_driver_version", lambda: 13000)
    backends._check_required()


# --- without kernels

FORWARD = """
import warnings
import torch
from variator_kernels import backends, functional as vf
x, w, b = torch.randn(2, 8, 4), torch.randn(2, 8), torch.randn(2)
def warned(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found if "reference" in str(w.message)]
try:
    vf.group_merge(x, w, b, backend="cpu")
except ValueError as error:
    print("error", error)
print("chosen", warned(lambda: vf.group_merge(x, w, b, backend="reference")))
print("weight", warned(lambda: backends.resolve("auto", torch.nn.Parameter(x))))
print("meta", warned(lambda: vf.group_merge(*(t.to("meta") for t in (x, w, b)))))
FIRST
print("second", warned(lambda: vf.group_merge(x, w, b)))
"""
EAGER = 'print("first", warned(lambda: vf.group_merge(x, w, b)))'
COMPILED = """
compiled = torch.compile(vf.group_merge, fullgraph=True, backend="eager")
print("first", warned(lambda: compiled(x, w, b)))
"""


@pytest.mark.parametrize("first", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_the_first_forward_without_kernels_says_so(without_kernels, first):
    done = python(without_kernels, FORWARD.replace("FIRST", first))
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["error"].startswith("backend 'cpu' cannot run here: the CPU kernels were not")
    for told in (lines["error"], lines["first"]):
        assert NO_COMPILER["reason"] in told and "VARIATOR_REQUIRE=cpu pip install" in told
    assert "is slower" in lines["first"]
    assert lines["chosen"] == lines["weight"] == lines["meta"] == lines["second"] == "[]"
    assert "variator" not in done.stderr  # nothing else, at import or behind the record


def test_reasons_of_other_kinds(without_kernels):
    package, record = without_kernels / "variator_kernels", "_build_info.json"
    code = "from variator_kernels import extension; print(extension.why_missing())"
    try:
        (package / record).write_text(json.dumps(RECORD | {"cpu": {"built": True, "reason": ""}}))
        assert "were built for another Python" in python(without_kernels, code).stdout
        (package / record).unlink()
        assert "was not built, so it has no CPU kernels" in python(without_kernels, code).stdout
    finally:
        (package / record).write_text(json.dumps(RECORD))


@pytest.mark.parametrize(
    ("limits", "vnni", "bf16"),
    [
        ({}, True, True),
        ({"ONEDNN_MAX_CPU_ISA": " avx2 "}, False, False),
        ({"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, False, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "DNNL_MAX_CPU_ISA": "AVX2"}, True, False),
        ({"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, True, True),
    ],
)
def test_what_onednn_is_allowed(monkeypatch, limits, vnni, bf16):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.setenv(name, limits.get(name, ""))
    allows = environment.onednn_allows
    assert (allows("vnni"), allows("bf16")) == (vnni, bf16)
