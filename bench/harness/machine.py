"""What a result must say of where it comes from: machine, versions, commit."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from variator_kernels import extension

from .. import internals

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
DATA = ROOT.parent / "shared" / "data"
"""Where the measurements' data lie, beside the repository."""
ISA_FLAG = re.compile(r"avx|amx|fma|f16c|sse4|asimd|sve|bf16")
PEERS = ("openvino", "nncf", "onnx", "onnxruntime", "ctranslate2", "torchao")
"""What ``bench.peers`` compares with."""
PACKAGES = ("variator-kernels", "torch", "triton", "transformers", "numpy", *PEERS)


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def environment(**more: str) -> dict[str, str]:
    """Of processes that import this tree."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **more, "PYTHONPATH": os.pathsep.join(paths)}


def isa_flags() -> list[str]:
    """The processor's vector instruction sets, as the operating system names them."""
    info = _cpuinfo()
    flags = info.get("flags", info.get("Features", "")).split()
    return sorted(flag for flag in flags if ISA_FLAG.search(flag))


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 by instructions of its own."""
    return any("bf16" in flag for flag in isa_flags())


def bf16_pays() -> bool:
    """Whether products in bf16 take less time than in fp32."""
    return has_bf16() and internals.bf16_multiplies()


def has_vnni() -> bool:
    """Whether it multiplies int8 by instructions that cannot saturate."""
    return any("vnni" in flag or "amx_int8" in flag for flag in isa_flags())


def machine() -> dict[str, Any]:
    """The processor, its cores and instruction sets, and what the kernels use of them."""
    info = _cpuinfo()
    kernels = extension.load()
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "family": info.get("cpu family"),
        "model": info.get("model"),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "isa": isa_flags(),
        "kernels_isa": kernels.active_isa() if kernels else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def slug() -> str:
    """A folder name for this kind of machine: processor, cores, widest instruction set."""
    here, flags = machine(), isa_flags()
    widest = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "")
    text = f"{here['cpu']} {here['cores']} cores {widest}".lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@.*?ghz|\bcpu\b", "", text)).strip("-")


def versions() -> dict[str, str]:
    """Python and the packages that matter, as installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    return found


def commit() -> dict[str, Any]:
    """The commit of the source tree, and whether it had other changes than results."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--", ".", ":!bench/results", ":!README.md", ":!docs"
        )
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
