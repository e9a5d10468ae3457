"""``python -m variator_kernels`` and the import of the package."""

import subprocess
import sys
from pathlib import Path

import variator_kernels as vk
from variator_kernels import __main__ as main
from variator_kernels import backends, extension, version

ROOT = Path(__file__).parents[1]


def run(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_prints_every_backend():
    done = run("-m", "variator_kernels")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name in ("reference", "cpu", "triton", "cuda"):
        assert [line for line in lines if line.split()[:1] == [name]], done.stdout
    for name in ("triton", "cuda"):
        line = [line for line in lines if line.split()[:1] == [name]][-1]
        never = "never run on a GPU: 'auto' does not pick it" in line
        assert never is not bool(backends.proven_on(name)), line
    for name in (
        "torch",
        "transformers",
        "threads",
        "packed weights",
        "bf16 products",
        "quantised models",
    ):
        assert [line for line in lines if line.startswith(name)]


def test_says_why_a_backend_is_missing(monkeypatch):
    missing = backends.Status("cpu", False, "no compiler")
    monkeypatch.setattr(backends, "status", lambda: [missing])
    assert "cpu             not usable: no compiler" in main.report()


def test_tells_what_multiplies_in_int8():
    (line,) = [line for line in main.report().splitlines() if line.startswith("int8 products")]
    cpu = extension.load()
    expected = cpu is not None and cpu.active_isa() != "portable"
    assert ("none" not in line) is expected, line


def test_tells_what_was_built(monkeypatch):
    monkeypatch.setattr(extension, "build_info", lambda: {"compiler": "some"})
    assert "compiler        some" in main.report()


def test_import_is_light():
    script = "import sys, variator_kernels; print('transformers' in sys.modules)"
    done = run("-c", script)
    assert done.stdout.strip() == "False", done.stderr


def test_public_names():
    assert all(hasattr(vk, name) for name in vk.__all__)
    project = (ROOT / "pyproject.toml").read_text()
    assert 'attr = "variator_kernels.version.__version__"' in project
    assert vk.__version__ == version.__version__
