"""The GPU kernels under NVIDIA's compute-sanitizer: ``python -m bench.gpu.sanitize``.

Runs memcheck, racecheck, initcheck and synccheck over small forward and backward passes of every
kernel. Needs a GPU and compute-sanitizer; every tool must end without an error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

import torch

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OPTIONS = ("--error-exitcode", "1", "--print-limit", "20")
# PyTorch's own kernels are not looked at; Triton's have no name in common.
KERNELS = {
    "cuda": ("--kernel-regex", "kns=variator"),
    "triton": ("--kernel-regex-exclude", "kns=at::"),
}
# Otherwise PyTorch's arrays lie in large blocks, and what is beside one is no error.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SIZES = ((72, 4, 64), (1288, 5, 64), (520, 32, 130))  # d, k, r


def workload(backend: str, device: str = "cuda", sizes: tuple = SIZES) -> None:
    """Every kernel once: both ways forward, gradients, masks, packed input."""
    from variator_kernels import functional
    from variator_kernels.feed_forward import FeedForward, PluginWeights
    from variator_kernels.ops.compressed_ffn import cuda as sublayer

    def random(*shape: int) -> torch.Tensor:
        made = torch.randn(*shape, device=device) * shape[-1] ** -0.5
        return made.to(torch.bfloat16).requires_grad_()

    for d, k, r in sizes:
        shapes = [(k, k * d), (k,), (r, 2 * d), (r,), (d, r), (d,)]
        made = [random(*shape) for shape in shapes]
        plugin = PluginWeights(*made)  # type: ignore[arg-type]
        ffn = FeedForward(random(136, d), random(d, 136), w_gate=random(136, d), norm="layer",
                          norm_weight=random(d), norm_bias=random(d))  # fmt: skip
        x = torch.randn(2, 75, d, device=device).to(torch.bfloat16).requires_grad_()
        mask = torch.rand(2, 75, device=device) > 0.3
        offsets = torch.tensor([3, 40, 41, 140], device=device)
        with torch.no_grad():
            for groups in (0, 1024) if backend == "cuda" else (0,):
                sublayer.ONE_LAUNCH_GROUPS = groups
                for options in ({}, {"mask": mask}):
                    functional.compressed_ffn(x, plugin, ffn, backend=backend, **options)
                flat = x.view(-1, d)
                functional.compressed_ffn(flat, plugin, ffn, cu_seqlens=offsets, backend=backend)
        functional.compressed_ffn(x, plugin, ffn, mask=mask, backend=backend).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--workload", action="store_true", help="only run the kernels")
    parser.add_argument("--backend", default="cuda", choices=KERNELS)
    parser.add_argument("--tool", nargs="+", default=TOOLS, choices=TOOLS)
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: PyTorch sees none")
        return 2
    if chosen.workload:
        workload(chosen.backend)
        return 0
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on PATH")
        return 2
    run = [*OPTIONS, *KERNELS[chosen.backend], sys.executable, "-m", "bench.gpu.sanitize"]
    run += ["--workload", "--backend", chosen.backend]
    env = {**os.environ, **ENVIRONMENT}
    failed = [
        tool
        for tool in chosen.tool
        if subprocess.run([sanitizer, "--tool", tool, *run], check=False, env=env).returncode
    ]
    print(f"errors under {', '.join(failed)}" if failed else f"clean: {', '.join(chosen.tool)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
