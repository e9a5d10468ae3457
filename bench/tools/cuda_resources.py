"""The table of what the CUDA kernels use, from the built extension: ``make cuda-table``.

Registers, stack, shared memory, occupancy and matrix instructions by kernel and architecture, for
a bottleneck of 64. No GPU is needed, and none of it says how fast a kernel runs. Writes
``csrc/cuda/resources.json`` and ``resources.md``; fails where a kernel spills, keeps a stack, asks
for too much shared memory or multiplies matrices without its matrix instructions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.harness import tables
from bench.tools import cuda_binary
from variator_kernels import backends, extension

OUTPUT = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
COLUMNS = {
    "kernel": "kernel",
    "variant": "dtype, variant",
    "arch": "architecture",
    "registers": "registers",
    "stack": "stack, bytes",
    "dynamic_shared": "shared memory, bytes",
    "threads": "threads a block",
    "blocks_a_multiprocessor": "blocks a multiprocessor",
    "warps_a_multiprocessor": "warps a multiprocessor",
    "hmma": "HMMA",
    "hgmma": "HGMMA",
}


def table() -> list[cuda_binary.Row]:
    """A row a kernel and architecture of the built extension."""
    module = cuda_binary.module_path()
    if module is None:
        raise FileNotFoundError(f"the CUDA kernels are not built: {extension.why_missing('cuda')}")
    rows = cuda_binary.resources(module)
    cuda_binary.count_instructions(module, rows)
    cuda_binary.add_occupancy(rows, extension.load("cuda"))
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"], row["variant"]))


def markdown(rows: list[cuda_binary.Row], compiler: str) -> str:
    text = (
        f"Compiled with {compiler}, for a bottleneck of 64, by `make cuda-table`. The number of\n"
        "a variant is the template's: blocks of columns in registers (merge, one launch), or\n"
        "whether the bottleneck is one chunk. None of these kernels ever ran on a GPU."
    )
    columns = [tables.key(heading, name) for name, heading in COLUMNS.items()]
    return f"# What the CUDA kernels use\n\n{text}\n\n{tables.markdown(columns, rows)}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    rows = [row for row in table() if row["arch"] in cuda_binary.CHIPS]
    compiler = backends.build_info().get("cuda", {}).get("compiler", "nvcc")
    kept = [{key: value for key, value in row.items() if key != "symbol"} for row in rows]
    text = json.dumps({"compiler": compiler, "kernels": kept}, indent=1)
    (chosen.output / "resources.json").write_text(text + "\n")
    (chosen.output / "resources.md").write_text(markdown(rows, compiler))
    found = cuda_binary.faults(rows)
    print("\n".join(found) if found else f"{len(rows)} kernels, no faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
