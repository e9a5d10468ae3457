"""The CUDA kernels' emulation on the CPU: loaded before anything imports variator_kernels.

It runs the kernels' own source on the CPU, thread by thread, and shows what they compute: wrong
indices, missing barriers, unwritten results. It is no GPU: nothing about time, memory order or
CUTLASS's products follows from it.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

BUILT = Path(__file__).parents[1] / "build" / "emulation"


def enable() -> None:
    """Nothing happens where there is a GPU, or `make emulation` did not run."""
    found = sorted(BUILT.glob("_cuda*.so"))
    if found and not torch.cuda.is_available():
        os.environ.setdefault("VARIATOR_CUDA_EXTENSION", str(found[0]))
