"""Launch settings as data: ``launch.json``, written by ``python -m bench.tools.tune_triton``.

A row has a kernel's name, what it is for (any of ``arch``, ``d``, ``f``, ``k``, ``r``, ``dtype``,
``activation``, ``rows``) and its settings. ``r`` is the bottleneck, padded to a power of two;
``rows`` is ``"few"`` where the usual tiles would leave multiprocessors idle, ``"many"`` elsewhere:
two classes, so that a kernel is compiled twice at most whatever sizes come. Of attention ``d`` is
the head size, padded to a power of two, and ``terms`` whether distances have some. The row that
names most of what a launch is for wins, of equals the later one; a row without conditions is the
fallback. An architecture has the rows of the one that it is like, too (:data:`LIKE`). Nothing is
tuned at run time.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("launch.json")
INTERPRETER = "interpreter"
TOKENS_A_TILE = 64
# sm_120, Ada and the smaller Amperes multiply as sm_80 does, with 99 KiB of shared memory for a
# program instead of 163.
LIKE = {
    "sm_86": "sm_120",
    "sm_89": "sm_120",
    "sm_103": "sm_100",
    "sm_120": "sm_80",
    "sm_121": "sm_120",
    "gfx950": "gfx942",
}


class Launch(NamedTuple):
    """A launch but for its tensors, which come first among a kernel's arguments."""

    kernel: Any
    grid: tuple[int, ...]
    numbers: tuple[float, ...]
    constants: dict[str, Any]

    def __call__(self, *tensors: Any) -> None:
        # What `kernel[grid]` calls, without packing the arguments twice.
        self.kernel.run(*tensors, *self.numbers, grid=self.grid, warmup=False, **self.constants)


_rows: list[dict[str, Any]] | None = None
_uses = 0


def table() -> list[dict[str, Any]]:
    """The rows in use: the committed table's, unless :func:`use` gave others."""
    global _rows
    if _rows is None:
        _rows = json.loads(TABLE.read_text())
    return _rows


def use(rows: list[dict[str, Any]]) -> None:
    """Other rows from now on, for tuning."""
    global _rows, _uses
    _rows = rows
    _uses += 1
    settings.cache_clear()


@functools.cache
def _arch(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def arch(x: Tensor) -> str:
    """``"sm_90"``, ``"gfx942"``; ``"interpreter"`` for a tensor on the CPU."""
    return _arch(x.device) if x.device.type == "cuda" else INTERPRETER


def _is(case: dict[str, Any], name: str, wanted: Any) -> bool:
    value = case.get(name)
    if name == "arch":
        while value != wanted and value in LIKE:
            value = LIKE[value]
    return value == wanted


@functools.cache
def settings(kernel: str, **case: Any) -> dict[str, Any]:
    """The settings of ``kernel`` for a case: values by the names above."""
    best: dict[str, Any] = {}
    most = -1
    for row in table():
        if row["kernel"] != kernel:
            continue
        wanted = row["case"]
        if len(wanted) >= most and all(_is(case, name, of) for name, of in wanted.items()):
            best, most = row["settings"], len(wanted)
    if most < 0:
        raise LookupError(f"{TABLE.name} has no row for kernel {kernel!r} in {case}")
    return best


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up; ``triton.cdiv`` takes microseconds on the host."""
    return -(-a // b)


def tiles(tokens: int) -> int:
    """The usual tiles of so many tokens."""
    return cdiv(tokens, TOKENS_A_TILE)


def case(x: Tensor, d: int, k: int, tiles: int, **more: Any) -> dict[str, Any]:
    """What a launch on x's device and dtype is for: vectors of size d, k a group, in ``tiles``."""
    rows = "few" if tiles < processors(x) else "many"
    return {"arch": arch(x), "d": d, "k": k, "dtype": name(x.dtype), "rows": rows, **more}


def chooses(x: Tensor) -> tuple[Any, ...]:
    """What decides about launches on x's device besides the form of what they get."""
    return arch(x), processors(x), settings, _uses


def power_of_2(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least both."""
    return max(least, 1 << max(value - 1, 0).bit_length())


def bottleneck(r: int) -> int:
    """The bottleneck as the table names it; not less than what a matrix product needs."""
    return power_of_2(r, 16)


def options(row: dict[str, Any]) -> dict[str, int]:
    """What of the settings is for the compiler."""
    return {"num_warps": row["warps"], "num_stages": row["stages"]}


def precision(x: Tensor) -> str:
    """How products of fp32 are made; of 16-bit types it says nothing.

    NVIDIA's tensor cores take three TF32 products for nearly all of fp32's bits; one alone would
    miss the tolerance by far, and without them large tiles do not fit into registers.
    """
    return "tf32x3" if arch(x).startswith("sm_") else "ieee"


@functools.cache
def name(dtype: torch.dtype) -> str:
    """A dtype as the table names it."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(x: Tensor) -> int:
    """Multiprocessors of x's device; 2 under the interpreter."""
    return _processors(x.device) if x.device.type == "cuda" else 2


def device_of(x: Tensor) -> torch.cuda.device_of:
    """Kernels start on the current device: makes it x's."""
    return torch.cuda.device_of(x)
