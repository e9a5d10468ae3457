"""The table of what the CUDA kernels use, from the built extension: ``make cuda-table``.

Registers, stack, shared memory, occupancy and matrix instructions by kernel and architecture, for
a bottleneck of 64. No GPU is needed, and none of it says how fast a kernel runs. Writes
``csrc/cuda/resources.json`` and ``resources.md``; fails where a kernel spills, keeps a stack, asks
for too much shared memory or multiplies matrices without its matrix instructions.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness import tables
from bench.harness.machine import ROOT
from bench.harness.results import Row
from variator_kernels import extension

OUTPUT = ROOT / "csrc" / "cuda"
THREADS = {"gemm_sm90_64x128": 384, "gemm_sm90_128x192": 384, "gemm_sm90_128x256": 384,
           "gemm_sm80_128x128": 128}  # fmt: skip
OTHER_THREADS = 256
BOTTLENECK = 64


class Chip(NamedTuple):
    """What an architecture has for one multiprocessor (CUDA C++ programming guide)."""

    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    shared: int = 0  # bytes
    shared_a_block: int = 0


CHIPS = {
    "sm_80": Chip(shared=164 * 1024, shared_a_block=163 * 1024),
    "sm_90a": Chip(shared=228 * 1024, shared_a_block=227 * 1024),
    "sm_100": Chip(shared=228 * 1024, shared_a_block=227 * 1024),
    "sm_120": Chip(threads=1536, blocks=24, shared=100 * 1024, shared_a_block=99 * 1024),
}
RESERVED = 1024  # bytes of shared memory that a block has besides


def module_path() -> Path | None:
    """The built extension, or None."""
    spec = importlib.util.find_spec("variator_kernels")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [file for folder in folders for file in Path(folder).glob("_cuda*.so")]
    return found[0] if found else None


def disassembler() -> str | None:
    """cuobjdump: the toolkit's, or the one in Triton's package."""
    places = [shutil.which("cuobjdump")]
    if spec := importlib.util.find_spec("triton"):
        places.append(f"{spec.submodule_search_locations[0]}/backends/nvidia/bin/cuobjdump")  # type: ignore[index]
    return next((place for place in places if place and Path(place).exists()), None)


def _output(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout


def short_name(symbol: str) -> tuple[str, str]:
    """A kernel's name and what it is compiled for, from its mangled name."""
    dtype = "bf16" if "bfloat16" in symbol or "BF16" in symbol else "fp16"
    if "cutlass" in symbol:
        if "CollectiveMma" not in symbol:
            return "gemm_sm80_128x128", dtype
        large = next((n for n in (192, 256) if f"ILi{n}E" in symbol), None)
        return "gemm_sm90_" + (f"128x{large}" if large else "64x128"), dtype
    name = re.search(r"\d+([a-z_]+_kernel)", symbol)
    if name is None:
        raise ValueError(f"not a kernel of this package: {symbol}")
    choice = re.search(r"_kernelINS\w*?(?:BF16|F16)EL[ib](\d+)E", symbol)
    return name[1], dtype + (f", {choice[1]}" if choice else "")


def resources(module: Path) -> list[Row]:
    """A row a kernel and architecture, without what the machine code does not tell."""
    tool = disassembler()
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither on PATH nor in Triton's package")
    rows: list[Row] = []
    arch = ""
    symbol = ""
    for line in _output(tool, "--dump-resource-usage", module).splitlines():
        if found := re.match(r"\s*arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found[1]
        elif "REG:" in line and symbol:
            usage = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
            name, variant = short_name(symbol)
            row: Row = {"kernel": name, "variant": variant, "arch": arch, "symbol": symbol}
            row |= {"registers": usage["REG"], "stack": usage["STACK"]}
            rows.append(row | {"local": usage["LOCAL"], "static_shared": usage["SHARED"]})
            symbol = ""
    return rows


def count_instructions(module: Path, rows: list[Row]) -> None:
    """Adds to each row how often its machine code has an instruction that matters here."""
    of = {(row["arch"], row["symbol"]): row for row in rows}
    for each in rows:
        each.update(hgmma=0, hmma=0, calls=0, spills=0)
    arch = ""
    row: Row | None = None
    names = ((r"\bHGMMA\.", "hgmma"), (r"\bHMMA\.", "hmma"), (r"\bCALL\.", "calls"),
             (r"\b(?:LDL|STL)\b", "spills"))  # fmt: skip
    command = [str(disassembler()), "--dump-sass", str(module)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as dump:
        for line in dump.stdout or ():
            if found := re.match(r"\s*arch = (\S+)", line):
                arch = found[1]
            elif found := re.match(r"\s*Function : (\S+)", line):
                row = of.get((arch, found[1]))
            elif row is not None:
                for pattern, key in names:
                    if re.search(pattern, line):
                        row[key] += 1


def add_occupancy(rows: list[Row], cuda: Any) -> None:
    """Adds shared memory at launch, blocks and warps that a multiprocessor holds at once."""
    for row in rows:
        chip = CHIPS.get(row["arch"])
        if chip is None:
            continue
        threads = THREADS.get(row["kernel"], OTHER_THREADS)
        dynamic = cuda.shared_bytes(row["kernel"], BOTTLENECK)
        shared = row["static_shared"] + dynamic + RESERVED
        # Registers are given out 256 at a time to a warp.
        registers = -(-row["registers"] * 32 // 256) * 256 * threads // 32
        blocks = min(
            chip.blocks, chip.threads // threads, chip.registers // registers, chip.shared // shared
        )
        row.update(
            threads=threads,
            dynamic_shared=dynamic,
            blocks_a_multiprocessor=blocks,
            warps_a_multiprocessor=blocks * threads // 32,
        )


def faults(rows: list[Row]) -> list[str]:
    """What a kernel of this package must not have; a sentence each."""
    found = []
    for row in rows:
        where = f"{row['kernel']} ({row['variant']}, {row['arch']})"
        if row["stack"] or row["local"] or row["spills"]:
            found.append(f"{where}: {row['stack']} bytes of stack, {row['spills']} spills")
        chip = CHIPS.get(row["arch"])
        if chip and row["static_shared"] + row["dynamic_shared"] > chip.shared_a_block:
            found.append(f"{where}: {row['dynamic_shared']} bytes of shared memory")
        if chip and row["blocks_a_multiprocessor"] < 1:
            found.append(f"{where}: does not fit a multiprocessor")
        if row["kernel"].startswith("gemm_sm90") and not row["hgmma"]:
            found.append(f"{where}: no HGMMA")
        if row["kernel"].startswith("gemm_sm90") and row["calls"]:
            found.append(f"{where}: calls a function, so every wgmma is waited for")
        if not row["hgmma"] + row["hmma"]:
            found.append(f"{where}: no matrix instructions")
    return found


COLUMNS = {
    "kernel": "kernel", "variant": "dtype, variant", "arch": "architecture",
    "registers": "registers", "stack": "stack, bytes", "dynamic_shared": "shared memory, bytes",
    "threads": "threads a block", "blocks_a_multiprocessor": "blocks a multiprocessor",
    "warps_a_multiprocessor": "warps a multiprocessor", "hmma": "HMMA", "hgmma": "HGMMA",
}  # fmt: skip


def table() -> list[Row]:
    """A row a kernel and architecture of the built extension."""
    module = module_path()
    if module is None:
        raise FileNotFoundError(f"the CUDA kernels are not built: {extension.why_missing('cuda')}")
    rows = resources(module)
    count_instructions(module, rows)
    add_occupancy(rows, extension.load("cuda"))
    return rows


def added(before: list[Row], now: list[Row]) -> list[Row]:
    """``now``, and of ``before`` the rows of other architectures, in order."""
    built = {row["arch"] for row in now}
    rows = [*now, *(row for row in before if row["arch"] not in built)]
    place = {arch: n for n, arch in enumerate(CHIPS)}
    return sorted(rows, key=lambda row: (row["kernel"], place[row["arch"]], row["variant"]))


def markdown(rows: list[Row], compiler: str) -> str:
    text = (
        f"Compiled with {compiler}, for a bottleneck of 64, by `make cuda-table`. The number of\n"
        "a variant is the template's: blocks of columns in registers (merge, one launch), whether\n"
        "there is a norm (weight gradient), or whether the bottleneck is one chunk. None of these\n"
        "kernels ever ran on a GPU."
    )
    columns = [tables.key(heading, name) for name, heading in COLUMNS.items()]
    return f"# What the CUDA kernels use\n\n{text}\n\n{tables.markdown(columns, rows)}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=OUTPUT)
    help = "keep the file's rows of architectures that are not built"
    parser.add_argument("--add", action="store_true", help=help)
    chosen = parser.parse_args(arguments)
    rows = [row for row in table() if row["arch"] in CHIPS]
    found = faults(rows)
    compiler = extension.build_info().get("cuda", {}).get("compiler", "nvcc")
    for row in rows:
        del row["symbol"]
    file = chosen.output / "resources.json"
    rows = added(json.loads(file.read_text())["kernels"] if chosen.add else [], rows)
    file.write_text(json.dumps({"compiler": compiler, "kernels": rows}, indent=1) + "\n")
    (chosen.output / "resources.md").write_text(markdown(rows, compiler))
    print("\n".join(found) if found else f"{len(rows)} kernels, no faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
