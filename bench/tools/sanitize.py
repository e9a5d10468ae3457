"""The GPU kernels under NVIDIA's compute-sanitizer: ``python -m bench.tools.sanitize``.

Runs memcheck, racecheck, initcheck and synccheck over small forward and backward passes of every
kernel. Needs a GPU and compute-sanitizer; every tool must end without an error.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from functools import partial

import torch

from bench import internals
from variator_kernels import FeedForward, PluginWeights, functional

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OPTIONS = ("--error-exitcode", "1", "--print-limit", "20")
# PyTorch's own kernels are not looked at, except by initcheck, which must see them write. Triton's
# have no name in common.
OURS = {
    "cuda": ("--kernel-regex", "kns=variator"),
    "triton": ("--kernel-regex-exclude", "kns=at::"),
}
# An allocation a tensor: inside PyTorch's pool nothing is out of bounds, and all was written once.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

# d, k, r: rows in registers (1 to 4 blocks a warp) or read again, one launch of both kinds, a
# bottleneck of one chunk, of several, and of more shared memory than a kernel has unasked.
SIZES = ((72, 4, 64), (264, 3, 64), (520, 4, 64), (776, 2, 64), (104, 5, 130), (1032, 6, 64),
         (40, 32, 512))  # fmt: skip
# rows, columns, inner: a product for each tile on a GPU of 132 multiprocessors
PRODUCTS = ((40, 72, 64), (3456, 576, 64), (3456, 832, 64))


def workload(backend: str, device: str = "cuda", tokens: int = 75) -> None:
    """Every kernel: both ways forward, gradients, masks, packed input."""

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * shape[-1] ** -0.5).to(dtype)

    for (d, k, r), dtype in itertools.product(SIZES, (torch.bfloat16, torch.float16)):
        made = partial(random, dtype=dtype)
        shapes = ((k, k * d), (k,), (r, 2 * d), (r,), (d, r), (d,))
        plugin = PluginWeights._make([*(made(*shape) for shape in shapes), "tanh"])
        ffn = FeedForward(made(136, d), made(d, 136), w_gate=made(136, d), norm="layer",
                          norm_weight=made(d), norm_bias=made(d))  # fmt: skip
        x = made(2, tokens, d)
        mask = torch.rand(2, tokens, device=device) > 0.3
        offsets = torch.tensor([3, tokens // 2, tokens // 2 + 1, 2 * tokens - 3], device=device)
        for groups in (0, 1024) if backend == "cuda" else (0,):
            sublayer = internals.launched(
                partial(functional.compressed_ffn, backend=backend), groups
            )
            with torch.no_grad(), internals.buffers_apart():
                for where in (None, mask):
                    sublayer(x, plugin, ffn, mask=where)
                sublayer(x.view(-1, d), plugin, ffn, cu_seqlens=offsets)
        leaves = (x, *plugin[:6], ffn.norm_weight, ffn.norm_bias)
        for leaf in leaves:
            leaf.requires_grad_()  # type: ignore[union-attr]
        functional.compressed_ffn(x, plugin, ffn, mask=mask, backend=backend).sum().backward()
    if backend == "cuda":
        for rows, columns, inner in PRODUCTS:
            bias = random(columns)
            internals.cuda_product(random(rows, inner), random(columns, inner), bias, "gelu")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--workload", action="store_true", help="only run the kernels")
    parser.add_argument("--backend", default="cuda", choices=tuple(OURS))
    parser.add_argument("--tool", nargs="+", default=TOOLS, choices=TOOLS)
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: PyTorch sees none")
        return 2
    if chosen.workload:
        workload(chosen.backend)
        torch.cuda.synchronize()
        return 0
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on PATH")
        return 2
    run = [sys.executable, "-m", "bench.tools.sanitize", "--workload"]
    run += ["--backend", chosen.backend]
    failed = []
    for tool in chosen.tool:
        looked_at = () if tool == "initcheck" else OURS[chosen.backend]
        command = [sanitizer, "--tool", tool, *OPTIONS, *looked_at, *run]
        if subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=False).returncode:
            failed.append(tool)
    print(f"errors under {', '.join(failed)}" if failed else f"clean: {', '.join(chosen.tool)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
