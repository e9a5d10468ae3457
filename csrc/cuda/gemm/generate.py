"""Writes instantiations/: a file per CUTLASS GEMM, so that they compile side by side.

Run it after changing KERNELS, and commit what it writes.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "instantiations"
# Architecture, and the output tile [rows, columns] of a thread block.
KERNELS = ((80, 128, 128), (90, 64, 128), (90, 128, 192), (90, 128, 256))
DTYPES = {"bf16": "bfloat16", "f16": "float16"}
"""In a file's name, and in C++."""

TEMPLATE = """\
// Written by gemm/generate.py.
#include "gemm/gemm_sm{arch}.cuh"

template variator::cuda::GemmKernel
variator::cuda::gemm_sm{arch}<{rows}, {columns}, variator::cuda::DType::{dtype}>();
"""


def files() -> dict[str, str]:
    """The text of each file in ``instantiations``, by name."""
    return {
        f"gemm_sm{arch}_{rows}x{columns}_{name}.cu": TEMPLATE.format(
            arch=arch, rows=rows, columns=columns, dtype=dtype
        )
        for arch, rows, columns in KERNELS
        for name, dtype in DTYPES.items()
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.cu"):
        old.unlink()
    for name, text in files().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
