"""The kernels on a GPU, predicted: ``python -m bench.tools.predict_gpu``.

Nothing is measured and no GPU is used. Each kernel of a forward pass (of CUDA's a backward pass
too) is compiled for Hopper, and a
thread block's way through the machine code is walked (``sass_walk``): what its warps issue,
products on tensor cores, steps of shared memory and L1; besides, each tensor's bytes once. The
greatest is a bound. It sees no latency, no second read that misses L2, and no operands that HGMMA
takes from shared memory itself.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bench.harness import tables
from bench.harness.machine import RESULTS, ROOT
from bench.tools import sass
from bench.tools.cuda_cases import SOURCES, Case, CudaLaunch
from bench.tools.sass_walk import Count, Launch, walk
from bench.tools.triton_cases import MODELS, sublayer
from bench.tools.triton_compiler import Launched, compiling, parameters

PAGE = ROOT / "docs" / "gpu_predicted.md"
FIGURES = RESULTS / "compiled" / "predicted.json"
RATIOS = (2, 4, 8, 16)
SIZES = {"llama-7b": (8, 2048, 64)}
SIZE = (32, 512, 64)
BACKENDS = ("triton", "cuda")
# Where parameters begin in Hopper's bank of constants; before them lies the size of a block.
PARAMETERS = 0x210


class Chip(NamedTuple):
    """NVIDIA's data sheet of an SXM part; the clock is that of its dense bf16 FLOP rate."""

    processors: int
    hertz: float
    bytes_a_second: float
    tensor_flops_a_clock: int = 4096
    issues_a_clock: int = 4


CHIPS = {"H100": Chip(132, 1.83e9, 3.35e12), "H200": Chip(132, 1.83e9, 4.8e12)}


class Work(NamedTuple):
    """A launch: thread blocks, what one of them does, and bytes of every tensor once."""

    kernel: str
    blocks: int
    moved: int
    one: Count


def _bank(threads: int, arguments: bytes) -> bytes:
    return threads.to_bytes(4, "little").ljust(PARAMETERS, b"\0") + arguments


def _of_triton(launch: Launched) -> Work:
    a, blocks = launch.arguments, 1
    for extent in launch.grid:
        blocks *= extent
    tensors = [getattr(value, "base", value) for value in a.values()]
    moved = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    if launch.name == "linear_kernel":  # waits for copies that nobody walks through: tiles count
        tiles = -(-a["rows"] // a["BM"]) * -(-a["columns"] // a["BN"])
        flops = 2 * a["BM"] * a["BN"] * a["inner"] * (2 if a["GATED"] else 1)
        return Work(launch.name, blocks, moved, Count(flops=-(-tiles // blocks) * flops))
    (code,) = sass.kernels(sass.disassembled(launch.kernel.asm["cubin"])).values()
    threads = 32 * launch.kernel.metadata.num_warps
    one, _ = walk(Launch(code, threads, _bank(threads, parameters(launch))))
    return Work(launch.name, blocks, moved, one)


def compile_cuda(file: str) -> dict[str, list[sass.Instruction]]:
    """The kernels of ``csrc/cuda/kernels/<file>.cu``, compiled for sm_90a, by symbol.

    Raises:
        FileNotFoundError: there is no nvcc.
    """
    places = [shutil.which("nvcc"), *(str(p) for p in Path("/usr/local").glob("cuda*/bin/nvcc"))]
    if (nvcc := next(filter(None, places), None)) is None:
        raise FileNotFoundError("nvcc is neither on PATH nor in /usr/local/cuda*")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc, "-cubin", "-arch=sm_90a", "-std=c++17", "-O3", "-DNDEBUG", f"-I{SOURCES}"]
        source = SOURCES / "kernels" / f"{file}.cu"
        subprocess.run([*command, "-o", str(cubin), str(source)], check=True)
        return sass.kernels(sass.disassembled(cubin.read_bytes()))


_compiled: dict[str, dict[str, list[sass.Instruction]]] = {}


def _of_cuda(launch: CudaLaunch) -> Work:
    if launch.file not in _compiled:
        _compiled[launch.file] = compile_cuda(launch.file)
    (code,) = (code for name, code in _compiled[launch.file].items() if launch.symbol in name)
    one, _ = walk(Launch(code, launch.threads, _bank(launch.threads, launch.arguments)))
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    return Work(launch.kernel, blocks, launch.moved, one)


def works(
    backend: str, model: str, k: int, size: tuple[int, int, int], chip: Chip
) -> Iterator[Work]:
    """The launches of a model's forward pass; of CUDA's kernels of a backward pass too."""
    if backend == "triton":
        with compiling("sm_90") as launches:
            sublayer(MODELS[model], k, torch.bfloat16, backward=False, size=size)()
        yield from map(_of_triton, launches)
    else:
        case = Case(MODELS[model], k, size, chip.processors)
        yield from map(_of_cuda, [*case.forward(), *case.backward()])


def predict(work: Work, chip: Chip) -> dict[str, Any]:
    """Microseconds that a launch takes at least, by what could bound it."""
    turns = -(-work.blocks // chip.processors)  # thread blocks of the busiest multiprocessor
    clocks = {"tensor": work.one.flops / chip.tensor_flops_a_clock}
    if work.one.slots:
        clocks |= {
            "issue": work.one.slots / chip.issues_a_clock,
            "shared": work.one.shared,
            "L1": work.one.shared + work.one.cached,
        }
    bounds = {name: turns * number / chip.hertz * 1e6 for name, number in clocks.items()}
    bounds["memory"] = work.moved / chip.bytes_a_second * 1e6
    by = max(bounds, key=lambda name: bounds[name])
    found = {"kernel": work.kernel, "blocks": work.blocks, "slots": round(work.one.slots) or None}
    return {
        **found,
        **{n: round(v, 2) for n, v in bounds.items()},
        "bound": round(bounds[by], 2),
        "by": by,
    }


def rows(backends: list[str], models: list[str], ratios: list[int]) -> list[dict[str, Any]]:
    """A row a launch of each model's forward pass."""
    made = []
    for backend, model, k in itertools.product(backends, models, ratios):
        size = SIZES.get(model, SIZE)
        where = {"backend": backend, "model": model, "size": f"{size[0]} x {size[1]}", "k": k}
        for work in works(backend, model, k, size, CHIPS["H200"]):
            bound = predict(work, CHIPS["H100"])["bound"]
            made.append({**where, **predict(work, CHIPS["H200"]), "H100": bound})
            print(made[-1], flush=True)
    return made


def _microseconds(name: str) -> tables.Column:
    return tables.Column(f"{name}, µs", lambda row: f"{row[name]:.1f}" if name in row else "-")


COLUMNS = [
    *(tables.key(name, name) for name in ("model", "size", "k", "backend", "kernel", "blocks")),
    tables.Column("slots a block", lambda row: str(row["slots"] or "-")),
    *map(_microseconds, ("issue", "tensor", "shared", "L1", "memory", "bound")),
    tables.key("by", "by"),
    _microseconds("H100"),
]


def markdown(made: list[dict[str, Any]]) -> str:
    """The page: what the numbers are and are not, and the table."""
    of = CHIPS["H200"]
    place = {name: n for n, name in enumerate(MODELS)}
    made = sorted(made, key=lambda row: (place[row["model"]], row["k"], row["backend"]))
    return f"""# The kernels on a GPU, predicted

**Predicted from machine code, never measured.** No GPU was used.
`python -m bench.tools.predict_gpu` wrote it (Triton {triton.__version__}, bf16, r = 64) for an
H200 as its data sheet describes it: {of.processors} multiprocessors, {of.hertz / 1e9:g} GHz,
{of.bytes_a_second / 1e12:g} TB/s. An H100 has {CHIPS["H100"].bytes_a_second / 1e12:g} TB/s and is
otherwise the same; its bound is the last column. The same figures are in
`bench/results/compiled/predicted.json`.

One thread block's way through the machine code is walked: integers and branches are computed, so
loops run as often as they would and addresses are known; a branch on a number from memory goes
both ways. The bound is the greatest of five: instructions issued (four a clock and multiprocessor,
by the multiprocessor that has most blocks), products on tensor cores, 128-byte steps of shared
memory with its bank conflicts, the same with L1's, and every tensor's bytes once. Not seen:
latency, second reads that miss L2, operands that HGMMA takes from shared memory itself, launches,
that `mma.sync` reaches less than HGMMA's rate, and the products that are cuBLAS's or CUTLASS's.
`linear_kernel` has its tensor time by tiles alone. Attention, Triton's gradients and CUDA's
sublayer in one launch are not in it.

{tables.markdown(COLUMNS, made)}
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ratio", nargs="+", type=int, default=list(RATIOS))
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--add", action="store_true", help="keep the figures of other cases")
    chosen = parser.parse_args(arguments)
    made = rows(chosen.backend, chosen.model, chosen.ratio)
    if chosen.add:
        cases = {(row["backend"], row["model"], row["k"]) for row in made}
        before = json.loads(chosen.figures.read_text())["rows"]
        made += [r for r in before if (r["backend"], r["model"], r["k"]) not in cases]
    chips = {name: chip._asdict() for name, chip in CHIPS.items()}
    content = {"predicted": True, "measured": False, "chips": chips, "rows": made}
    chosen.figures.write_text(json.dumps(content, indent=1) + "\n")
    chosen.page.write_text(markdown(made))
    print(f"written to {chosen.page} and {chosen.figures}")


if __name__ == "__main__":
    main()
