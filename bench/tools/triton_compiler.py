"""Compiles what the Triton backend would launch, for a GPU that need not be there.

The backend itself runs, on tensors without memory (``meta``): each launch is compiled instead of
started. So what is checked is what would run: same settings, same specialisations.
"""

import contextlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from torch import Tensor
from torch.nn import functional
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, compute_cache_key

from variator_kernels import backends
from variator_kernels.triton_kernels import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# Shared memory a program can have, bytes.
SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024,
    "gfx942": 64 * 1024, "gfx950": 160 * 1024,
}  # fmt: skip
PROCESSORS = {
    "sm_80": 108,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 188,
    "gfx942": 304,
    "gfx950": 256,
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _Driver:
    """As much of a driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: one number a target.
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


class Launched(NamedTuple):
    """A launch that was compiled instead."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@contextlib.contextmanager
def compiling(arch: str) -> Iterator[list[Launched]]:
    """Inside, launches are compiled for ``arch`` and collected."""
    found: list[Launched] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **options}
        found.append(Launched(self.fn.__name__, kernel, grid, arguments))
        return kernel

    driver = triton.runtime.driver
    with (
        mock.patch.object(driver, "_active", _Driver(TARGETS[arch])),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "arch", lambda x: arch),
        mock.patch.object(launch, "processors", lambda x: PROCESSORS[arch]),
    ):
        yield found


SIZES = {"i1": 1, "i32": 4, "u32": 4, "fp32": 4}  # others: 8 bytes


def parameters(launch: Launched) -> bytes:
    """A launch's parameters as the machine code finds them; tensors lie at made-up addresses."""
    source, packed, place = launch.kernel.src, b"", 0x7F0000000000
    for name in source.fn.arg_names:
        kind, value = source.signature[name], launch.arguments[name]
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            packed += b"\0" * (-len(packed) % 64 + 128)
            sizes = struct.pack(f"<{len(value.shape)}i", *value.shape)
            packed += sizes + b"\0" * (-(len(packed) + len(sizes)) % 8)
            packed += struct.pack(f"<{len(value.strides)}q", *value.strides)
            continue
        size = SIZES.get(kind, 8)
        if kind.startswith("*"):
            place += 1 << 32
            value = place
        elif kind == "fp32":
            value = struct.unpack("<i", struct.pack("<f", value))[0]
        number = int(value) % (1 << 8 * size)
        packed += b"\0" * (-len(packed) % size) + number.to_bytes(size, "little")
    return packed + b"\0" * (-len(packed) % 8 + 16)  # behind them, memory that Triton may ask for


@contextlib.contextmanager
def stubbed(arch: str) -> Iterator[list[str]]:
    """Inside, launches do nothing but add their kernel's name; backend ``"triton"`` takes tensors
    on the CPU. PyTorch's product, which is cuBLAS's there, is one of them: ``"linear"``."""
    found: list[str] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(self.fn.__name__)

    def linear(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found.append("linear")
        return a.new_empty(a.shape[0], weight.shape[0])

    with (
        compiling(arch),
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(functional, "linear", linear),
        mock.patch.object(backends, "resolve", lambda backend, x: backend),
    ):
        yield found


@contextlib.contextmanager
def specialising(arch: str) -> Iterator[dict[str, set[str]]]:
    """Inside, launches are looked up as Triton does before compiling: its keys, by kernel."""
    found: dict[str, set[str]] = {}

    def look_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = self.device_caches[_Driver(TARGETS[arch]).get_current_device()][-1]
        key = compute_cache_key({}, *binder(*args, **options)[1:])
        found.setdefault(self.fn.__name__, set()).add(key)

    with compiling(arch), mock.patch.object(JITFunction, "run", look_up):
        yield found


_resources: dict[str, dict[str, Any]] = {}


def resources(arch: str, kernel: Any) -> dict[str, Any]:
    """Registers a thread, stack bytes, spills, shared memory, matrix instructions of which kind."""
    if kernel.hash not in _resources:
        _resources[kernel.hash] = _read(arch, kernel)
    return _resources[kernel.hash]


def _read(arch: str, kernel: Any) -> dict[str, Any]:
    if "cubin" in kernel.asm:
        usage = _tool("cuobjdump", "--dump-resource-usage", kernel.asm["cubin"])
        code = sass(kernel.asm["cubin"])
        # Tiles of less than 64 rows are multiplied as on Ampere.
        wide = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(arch, "HMMA")
        matrix, pattern = wide if wide in code else "HMMA", r"\b{}:(\d+)"
        names = ("REG", "STACK")
    else:
        usage = code = kernel.asm["amdgcn"]
        matrix, pattern = "v_mfma", r"\.{}:\s*(\d+)"
        names = ("vgpr_count", "private_segment_fixed_size")

    def number(name: str) -> int:
        return int(re.search(pattern.format(name), usage).group(1))  # type: ignore[union-attr]

    if "cubin" in kernel.asm:
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    else:
        spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    registers, stack = map(number, names)
    found = {"registers": registers, "stack": stack, "spills": spills}
    count = len(re.findall(rf"\b{matrix}(?:\b|_)", code))
    return found | {"shared": kernel.metadata.shared, "matrix": count, "by": matrix}


def sass(cubin: bytes) -> str:
    """The machine code as text."""
    return _tool("cuobjdump", "--dump-sass", cubin)


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_call(arch: str, call: Callable[[], Any]) -> list[dict[str, Any]]:
    """What ``call`` would launch on ``arch``: a row a kernel."""
    with compiling(arch) as found:
        call()
    return [
        {"kernel": made.name, "arch": arch, "warps": made.kernel.metadata.num_warps,
         **resources(arch, made.kernel)}
        for made in found
    ]  # fmt: skip
