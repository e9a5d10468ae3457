"""A CUDA sublayer's products as launches: CUTLASS's for the FFN, and all of it in one launch.

What CUTLASS passes to its kernels is known to CUTLASS alone: ``gemm_parameters.cu`` prints it.
"""

import functools
import json
from pathlib import Path

from bench import internals
from bench.tools import nvcc
from bench.tools.cuda_cases import Case, CudaLaunch, filled

PROGRAM = Path(__file__).parent / "gemm_parameters.cu"


def products(case: Case) -> list[CudaLaunch]:
    """The FFN's products, as ``csrc/cuda/launches.cpp`` launches them."""
    model, rows = case.model, case.groups
    first = [_product(case, rows, model.f, model.d, model.activation)]
    if model.gated:
        first.append(_product(case, rows, model.f, model.d, "none", factor=True))
    return [*first, _product(case, rows, model.d, model.f, "none")]


def _product(
    case: Case, rows: int, columns: int, inner: int, activation: str, factor: bool = False
) -> CudaLaunch:
    tile = case.cuda.gemm_tile(rows, columns, case.processors)
    bias = case.model.post_norm
    code = case.cuda.ffn_activations[activation]
    printed = nvcc.output(
        PROGRAM, *tile, case.processors, rows, columns, inner, code, int(bias), int(factor)
    )  # fmt: skip
    line, _, parameters = printed.partition(b"\n")
    *grid, threads = map(int, line.split())
    moved = 2 * (rows * inner + columns * inner + rows * columns * (1 + factor) + columns * bias)
    name = f"gemm_sm90_{tile[0]}x{tile[1]}"
    return CudaLaunch(
        f"{name}: {columns} x {inner}", f"gemm/{name}", name, (grid[0], grid[1], grid[2]),
        parameters, moved, threads,
    )  # fmt: skip


@functools.cache
def blocks_a_multiprocessor(variant: str) -> int:
    """How many of ``one_launch_kernel`` it holds, by ``make cuda-table``."""
    table = json.loads((nvcc.SOURCES / "resources.json").read_text())["kernels"]
    (row,) = (
        row for row in table
        if (row["kernel"], row["variant"], row["arch"]) == ("one_launch_kernel", variant, "sm_90a")
    )  # fmt: skip
    return int(row["blocks_a_multiprocessor"])


def one_launch_is_chosen(case: Case) -> bool:
    model = case.model
    most = internals.one_launch_groups(model.d, model.f, 2 + model.gated, case.processors)
    return case.groups <= most


def one_launch(case: Case) -> CudaLaunch:
    """The whole sublayer. Its thread block 0 has the most to do in every phase: units of work are
    dealt out from it on."""
    case.moved, model, cuda = 0, case.model, case.cuda
    d, f, groups = model.d, model.f, case.groups
    merge, weight = case.merge_parameters(), d * f
    u, splits = case.tensor(groups * d), cuda.splits(groups, d, f, case.processors)
    of = filled(
        "LayerParams", merge=merge, f=f, w_in=case.tensor(weight),
        w_gate=case.tensor(weight) if model.gated else 0, w_out=case.tensor(weight),
        b_in=case.tensor(f) if model.post_norm else 0,
        b_out=case.tensor(d) if model.post_norm else 0,
        activation=cuda.ffn_activations[model.activation], inner=case.tensor(groups * f), u=u,
        decompress=case.decompress_parameters(merge.x, u, merge.projected),
        partial=case.tensor(splits * groups * d, 4), splits=splits,
        blocks_a_part=cuda.blocks_a_part(groups, d, case.processors),
    )  # fmt: skip
    variant = 3 if cuda.resident_blocks(d) == 3 else 0
    at_once = case.processors * blocks_a_multiprocessor(f"bf16, {variant}")
    blocks = cuda.one_launch_blocks(groups, d, f, splits, at_once)
    symbol = f"one_launch_kernelINS0_4BF16ELi{variant}E"
    return CudaLaunch("one_launch_kernel", "kernels/one_launch", symbol, (blocks, 1, 1),
                      bytes(of), case.moved)  # fmt: skip
