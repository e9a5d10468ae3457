"""What the thread blocks of a model's launches do: compiled for Hopper, walked through."""

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.tools import cuda_products, cuda_resources, nvcc, sass
from bench.tools.cuda_cases import Case, CudaLaunch
from bench.tools.gpu_bounds import Chip, Work
from bench.tools.sass_walk import Launch, walk
from bench.tools.triton_cases import ATTENTIONS, MODELS, attention, sublayer
from bench.tools.triton_compiler import Launched, compiling, parameters

PARTS = ("forward", "backward", "few", "attention")
SIZES = {"llama-7b": (8, 2048, 64)}
SIZE = (32, 512, 64)
# Where one launch may be taken.
FEW = (1, 512, 64)
# From where on parameters lie in Hopper's bank of constants, at a multiple of their alignment;
# before them lie the sizes of a block and of the grid.
PARAMETERS = 0x210
# A descriptor's of TMA, and that of CUTLASS's parameters.
DESCRIPTOR, CUTLASS = 64, 128
# The memory of a grid's barrier, upper word first; not 0 in a cooperative launch.
BARRIER = 0x44


def size_of(part: str, model: str) -> tuple[int, int, int]:
    """Rows, tokens a row, and the bottleneck."""
    return FEW if part == "few" else SIZES.get(model, SIZE)


def bank(threads: int, grid: tuple[int, ...], arguments: bytes, alignment: int = 8) -> bytes:
    """A launch's constants as its machine code finds them."""
    sizes = (threads, 1, 1, *grid, *(1,) * (3 - len(grid)))
    head = b"".join(size.to_bytes(4, "little") for size in sizes).ljust(BARRIER, b"\0")
    head += (0x7F00).to_bytes(4, "little")
    return head.ljust(-(-PARAMETERS // alignment) * alignment, b"\0") + arguments


def _of_triton(launch: Launched) -> Work:
    a, blocks = launch.arguments, 1
    for extent in launch.grid:
        blocks *= extent
    tensors = [getattr(value, "base", value) for value in a.values()]
    moved = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    (code,) = sass.kernels(sass.disassembled(launch.kernel.asm["cubin"])).values()
    threads = 32 * launch.kernel.metadata.num_warps
    described = any(hasattr(value, "block_shape") for value in a.values())
    constants = bank(threads, launch.grid, parameters(launch), DESCRIPTOR if described else 8)
    one, _ = walk(Launch(code, threads, constants))
    return Work(launch.name, blocks, moved, one)


@functools.cache
def compiled(file: str) -> tuple[dict[str, list[sass.Instruction]], dict[str, bytes]]:
    """The kernels of ``csrc/cuda/<file>.cu``, and their tables of branches, by symbol."""
    made = nvcc.cubin(nvcc.SOURCES / f"{file}.cu")
    return sass.kernels(sass.disassembled(made)), sass.jump_tables(made)


def _is_of(launch: CudaLaunch, symbol: str) -> bool:
    if "cutlass" in symbol:
        return cuda_resources.short_name(symbol) == (launch.symbol, "bf16")
    return launch.symbol in symbol


def _of_cuda(launch: CudaLaunch) -> Work:
    kernels, tables = compiled(launch.file)
    (symbol,) = (name for name in kernels if _is_of(launch, name))
    alignment = CUTLASS if launch.file.startswith("gemm") else 8
    constants = bank(launch.threads, launch.grid, launch.arguments, alignment)
    jumps = tables.get(symbol, b"")
    one, _ = walk(Launch(kernels[symbol], launch.threads, constants, jumps=jumps))
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    return Work(launch.kernel, blocks, launch.moved, one)


def _triton_launches(part: str, model: str, k: int) -> Iterator[Launched]:
    size = size_of(part, model)
    with compiling("sm_90") as found:
        if part == "attention":
            rows, n, _ = size
            attention(ATTENTIONS[model], torch.bfloat16, (rows, n, -(-n // k)))()
        else:
            sublayer(MODELS[model], k, torch.bfloat16, backward=part == "backward", size=size)()
    if part != "backward":
        yield from found
        return
    # Its calls begin with the forward pass, and the backward pass makes some of it again.
    with compiling("sm_90") as forward:
        sublayer(MODELS[model], k, torch.bfloat16, backward=False, size=size)()
    done = {launch.name for launch in forward}
    yield from (launch for launch in found if launch.name not in done)


def _cuda_launches(part: str, model: str, k: int, chip: Chip) -> Iterator[CudaLaunch]:
    case = Case(MODELS[model], k, size_of(part, model), chip.processors)
    if part == "backward":
        yield from case.backward()
    elif part in ("forward", "few"):
        yield case.merge()
        yield from cuda_products.products(case)
        yield case.decompress()
    if part == "few":
        yield cuda_products.one_launch(case)


def works(part: str, backend: str, model: str, k: int, chip: Chip) -> Iterator[Work]:
    """The launches of a part of a model's work: those of a forward pass (of few rows: in several
    launches and in one), of a backward pass but for the FFN's own, or of attention."""
    if backend == "triton":
        yield from map(_of_triton, _triton_launches(part, model, k))
    else:
        yield from map(_of_cuda, _cuda_launches(part, model, k, chip))


def cases(
    parts: list[str], backends: list[str], models: list[str], ratios: list[int]
) -> Iterator[tuple[str, str, str, int]]:
    """What there is of each part."""
    for part, backend, model, k in itertools.product(parts, backends, models, ratios):
        if part == "attention" and (backend != "triton" or model not in ATTENTIONS):
            continue
        if part == "few" and backend == "triton":
            continue
        yield part, backend, model, k
