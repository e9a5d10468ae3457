"""Compiles every Triton kernel, without a GPU: ``python -m bench.tools.compile_triton``.

Registers, stack, spills, shared memory and matrix instructions go to a table; a kernel that spills,
asks for more shared memory than the chip has, or multiplies matrices without its matrix
instructions makes the command fail.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton

from bench.harness import tables
from bench.harness.machine import RESULTS
from bench.tools.triton_cases import ATTENTIONS, MODELS, attention, sublayer
from bench.tools.triton_compiler import SHARED_LIMIT, TARGETS, compile_call

OUTPUT = RESULTS / "compiled"
RATIOS = (2, 4, 8, 16, 32)
# Masks, packed input and kept tokens change addresses alone: compiled for one case.
FORMS, ALL_FORMS = ("plain", "masked", "packed", "kept"), ("t5-base", 4, "bf16")
# Sizes that have settings of their own: wide bottlenecks, and too few tokens for the usual tiles.
BOTTLENECKS, FEW = (64, 128, 256, 512), "few"
OTHER_SIZES = (("t5-base", 4), ("t5-base", 16), ("bert-base", 4))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Products of fp32 are three of the tensor cores' each: compiled for one case.
WIDE, ALL_WIDE = "fp32", ("sm_90", "t5-base", 4)
# These multiply no matrices.
PLAIN_KERNELS = ("weighted_sum_kernel", "score_gradient_kernel", "row_norm_kernel")
MATRIX_INSTRUCTION = {
    "sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA",
    "gfx942": "v_mfma", "gfx950": "v_mfma",
}  # fmt: skip
# Tiles of less than 64 rows, by the settings: mma.sync multiplies them.
SMALL = (("sm_100", "large heads"), ("sm_90", "fp32 r=256"), ("sm_90", "fp32 r=512"))
# Scalar registers spill there, into lanes of vector registers.
LEFT_OUT = (("gfx942", "grouped queries"), ("gfx950", "grouped queries"))


def problems(row: dict[str, Any]) -> list[str]:
    """What of a compiled kernel is not as it must be."""
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"{row['spills']} spills, {row['stack']} bytes of stack")
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"{row['shared']} bytes of shared memory, limit {SHARED_LIMIT[row['arch']]}")
    names = [name for arch, name in SMALL if arch == row["arch"]]
    few = all(
        FEW in case.split() or any(name in case for name in names) for case in row.get("cases", ())
    )
    wanted = MATRIX_INSTRUCTION[row["arch"]]
    if row["kernel"] not in PLAIN_KERNELS and not (row["matrix"] and (few or row["by"] == wanted)):
        found.append(f"no {wanted}")
    return found


def table(
    archs: Iterable[str], models: Iterable[str], ratios: Iterable[int], dtypes: Iterable[str],
    attentions: Iterable[str] = ATTENTIONS, bottlenecks: Iterable[int] = BOTTLENECKS,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row a distinct result, with the cases it serves; says which case it is at."""
    rows: dict[tuple, dict[str, Any]] = {}

    def add(arch: str, case: str, call: Callable[[], None]) -> None:
        print(arch, case, flush=True)
        for row in compile_call(arch, call):
            of = rows.setdefault(tuple(row.items()), {**row, "cases": []})["cases"]
            if case not in of:
                of.append(case)

    for arch, dtype in itertools.product(archs, dtypes):
        for name, k in itertools.product(models, ratios):
            if dtype == WIDE and (arch, name, k) != ALL_WIDE:
                continue
            for form in FORMS if (name, k, dtype) == ALL_FORMS else FORMS[:1]:
                case = f"{name} k={k} {dtype}" + (f" {form}" if form != "plain" else "")
                add(arch, case, sublayer(MODELS[name], k, DTYPES[dtype], form))
            if (name, k) not in OTHER_SIZES:
                continue
            sizes = {f"r={r}": (32, 512, r) for r in bottlenecks if r != 64} | {FEW: (1, 128, 64)}
            for word, size in sizes.items():
                case = f"{name} k={k} {dtype} {word}"
                add(arch, case, sublayer(MODELS[name], k, DTYPES[dtype], size=size))
        for name in attentions:
            if (arch, name) in LEFT_OUT or dtype == WIDE:
                continue
            add(arch, f"attention {name} {dtype}", attention(ATTENTIONS[name], DTYPES[dtype]))
    return list(rows.values())


def added(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``now``, and of ``before`` what was compiled for other cases."""
    done = {(row["arch"], case) for row in now for case in row["cases"]}
    kept = []
    for row in before:
        if others := [case for case in row["cases"] if (row["arch"], case) not in done]:
            kept.append({**row, "cases": others})
    rows: dict[tuple, dict[str, Any]] = {}
    for row in [*kept, *now]:
        key = tuple((name, value) for name, value in row.items() if name != "cases")
        rows.setdefault(key, {**row, "cases": []})["cases"] += row["cases"]
    return list(rows.values())


WORST = ("registers", "stack", "spills", "shared")
COLUMNS = [
    tables.key("arch", "arch"),
    tables.key("kernel", "kernel"),
    tables.key("results", "results"),
    *(tables.key("shared, bytes" if name == "shared" else name, name) for name in WORST),
    tables.key("matrix", "matrix"),
]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The worst of each kernel by architecture."""
    worst = []
    for arch, kernel in itertools.product(TARGETS, sorted({row["kernel"] for row in rows})):
        some = [row for row in rows if (row["arch"], row["kernel"]) == (arch, kernel)]
        if some:
            found = {name: max(row[name] for row in some) for name in WORST}
            least = "-" if kernel in PLAIN_KERNELS else min(row["matrix"] for row in some)
            found |= {"arch": arch, "kernel": kernel, "results": len(some), "matrix": least}
            worst.append(found)
    text = (
        f"Written by `python -m bench.tools.compile_triton`, Triton {triton.__version__}; no"
        " GPU was used. The largest values over all cases; the smallest number of matrix"
        " instructions (HMMA, HGMMA, UTCHMMA, v_mfma; kernels with a dash multiply no matrices)."
    )
    heading = "# Triton kernels, compiled ahead of time"
    return f"{heading}\n\n{text}\n\n{tables.markdown(COLUMNS, worst)}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ratio", nargs="+", type=int, default=list(RATIOS))
    parser.add_argument("--attention", nargs="*", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--bottleneck", nargs="+", type=int, default=list(BOTTLENECKS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES),
                        help="fp32 is compiled for {} {} k={} alone".format(*ALL_WIDE))  # fmt: skip
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"a folder (default {OUTPUT})")
    parser.add_argument("--add", action="store_true", help="keep the file's rows of other cases")
    chosen = parser.parse_args(arguments)
    rows = table(chosen.arch, chosen.model, chosen.ratio, chosen.dtype, chosen.attention,
                 chosen.bottleneck)  # fmt: skip
    chosen.output.mkdir(parents=True, exist_ok=True)
    if chosen.add:
        rows = added(json.loads((chosen.output / "triton.json").read_text())["rows"], rows)
    settings = {"triton": triton.__version__, "shared_limit": SHARED_LIMIT}
    content = json.dumps({"settings": settings, "rows": rows}, indent=1)
    (chosen.output / "triton.json").write_text(content + "\n")
    (chosen.output / "triton.md").write_text(markdown(rows))
    bad = [(row, found) for row in rows if (found := problems(row))]
    for row, found in bad:
        print(f"{row['arch']} {row['kernel']} ({row['cases'][0]}): {'; '.join(found)}", flush=True)
    print(f"{len(rows)} results, {len(bad)} with problems; written to {chosen.output}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
