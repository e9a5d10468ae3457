"""``python -m variator_kernels``: what is installed here, and what can run."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__, backends


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The environment as text, a fact a line."""
    lines = [
        ("variator_kernels", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("transformers", _version("transformers")),
        ("triton", _version("triton")),
        ("safetensors", _version("safetensors")),
        ("threads", str(torch.get_num_threads())),
    ]
    text = [f"{name:<18}{value}" for name, value in lines]
    build = backends.build_info()
    text += ["", "build"]
    text += [f"  {key:<16}{value}" for key, value in build.items()] or ["  nothing was recorded"]
    text += ["", "backends"]
    text += [
        f"  {s.name:<16}{'usable' if s.usable else 'not usable'}: {s.detail}"
        for s in backends.status()
    ]
    return "\n".join(text)


if __name__ == "__main__":
    print(report())
