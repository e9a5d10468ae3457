"""``python -m variator_kernels``: what is installed here, and what can run."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from . import __version__, backends, extension
from .freezing import how_writes_are_noticed
from .ops import int8_linear, prepack

UNBUILT = (
    "  nothing was recorded: this is a source folder that was not built (an installed package is\n"
    "  found from any other folder; `pip install -e .` builds this one)"
)


def _fact(value: object) -> object:
    """A record of the build in words."""
    if not isinstance(value, dict):
        return value
    shown = (", ".join(v) if isinstance(v, list) else v for v in value.values())
    pairs = zip(value, shown, strict=True)
    return "; ".join(f"{name} {fact}" for name, fact in pairs if fact not in ("", None))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The environment as text, a fact a line."""
    lines = [
        ("variator_kernels", __version__),
        ("from", str(Path(__file__).parent)),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("transformers", _version("transformers")),
        ("triton", _version("triton")),
        ("safetensors", _version("safetensors")),
        ("threads", str(torch.get_num_threads())),
    ]
    text = [f"{name:<18}{value}" for name, value in lines]
    build = extension.build_info()
    text += ["", "build"]
    text += [f"  {key:<16}{_fact(value)}" for key, value in build.items()] or [UNBUILT]
    text += ["", "backends"]
    text += [
        f"  {s.name:<16}{'usable' if s.usable else 'not usable'}: {s.detail}"
        for s in backends.status()
    ]
    text += ["", f"packed weights    {how_writes_are_noticed()}"]
    text += [f"bf16 products     {prepack.describe()}"]
    text += [f"int8 products     {int8_linear.describe()}"]
    text += [f"quantised models  {int8_linear.describe_stored()}"]
    return "\n".join(text)


if __name__ == "__main__":
    print(report())
