"""Compiles every Triton kernel ahead of time, without a GPU: ``python -m bench.compile_triton``.

Registers, stack, spills, shared memory and matrix instructions go to a table; a kernel that spills,
asks for more shared memory than the chip has, or multiplies matrices without its matrix
instructions makes the command fail.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from variator_kernels.ops.adapter_decompress import triton as decompress
from variator_kernels.ops.compressed_ffn import triton as ffn
from variator_kernels.ops.feed_forward import FeedForward, PluginWeights
from variator_kernels.ops.group_merge import triton as merge

from .common.triton_compile import SHARED_LIMIT, TARGETS, compile_call

OUTPUT = Path(__file__).parent / "results" / "compiled"
RATIOS = (2, 4, 8, 16, 32)
# Masks and packed input change addresses alone: compiled for one case.
FORMS, ALL_FORMS = ("plain", "masked", "packed"), ("t5-base", 4, "bf16")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# These multiply no matrices.
PLAIN_KERNELS = ("weighted_sum_kernel", "score_gradient_kernel", "row_norm_kernel")
MATRIX_INSTRUCTION = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma"}


class Model(NamedTuple):
    """What of a model's FFN sublayer decides how kernels are compiled."""

    d: int
    f: int
    activation: str
    norm: str
    gated: bool = False
    post_norm: bool = False


MODELS = {
    "t5-base": Model(768, 3072, "relu", "rms"),
    "t5-large": Model(1024, 4096, "relu", "rms"),
    "bert-base": Model(768, 3072, "gelu", "layer", post_norm=True),
    "llama-7b": Model(4096, 11008, "silu", "rms", gated=True),
}


def sublayer(
    model: Model,
    k: int,
    dtype: torch.dtype,
    form: str = "plain",
    backward: bool = True,
    size: tuple[int, int, int] = (32, 512, 64),
) -> Callable[[], None]:
    """Forward and backward of one sublayer on tensors without memory: every launch there is.

    ``size`` are rows, tokens a row, and the adapter's bottleneck.
    """
    (rows, n, r), d, f = size, model.d, model.f

    def make(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def run() -> None:
        plugin = PluginWeights(
            make(k, k * d), make(k), make(r, 2 * d), make(r), make(d, r), make(d)
        )
        described = FeedForward(
            make(f, d),
            make(d, f),
            w_gate=make(f, d) if model.gated else None,
            b_in=make(f) if model.post_norm else None,
            b_out=make(d) if model.post_norm else None,
            activation=model.activation,
            norm=model.norm,
            norm_weight=make(d),
            norm_bias=make(d) if model.norm == "layer" else None,
            post_norm=model.post_norm,
        )
        x, mask, offsets = make(rows, n, d), None, None
        if form == "masked":
            mask = torch.empty(rows, n, dtype=torch.bool, device="meta")
        if form == "packed":
            x = x.view(-1, d)
            offsets = torch.empty(rows + 1, dtype=torch.int32, device="meta")
        y = ffn.compressed_ffn(x, plugin, described, mask, offsets)
        if not backward:
            return
        norm = "none" if model.post_norm else model.norm
        norm_weight = None if model.post_norm else make(d)
        w1u, w1h = plugin.w1.chunk(2, -1)
        merge_weight = plugin.merge_weight
        merged, projected, weights = merge.group_merge(
            x, merge_weight, plugin.merge_bias, mask, offsets, norm, norm_weight, None, 1e-6, w1h
        )
        merge.group_merge_backward(
            merged,
            projected,
            x,
            weights,
            merge_weight,
            mask,
            offsets,
            norm,
            norm_weight,
            None,
            1e-6,
            w1h,
        )
        decompress.adapter_decompress_backward(
            y, merged, projected, w1u, plugin.b1, plugin.w2, mask, offsets, k, "tanh"
        )

    return run


def problems(row: dict[str, Any]) -> list[str]:
    """What of a compiled kernel is not as it must be."""
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"{row['spills']} spills, {row['stack']} bytes of stack")
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"{row['shared']} bytes of shared memory, limit {SHARED_LIMIT[row['arch']]}")
    if row["kernel"] not in PLAIN_KERNELS and not row["matrix"]:
        found.append(f"no {MATRIX_INSTRUCTION[row['arch']]}")
    return found


def table(
    archs: Iterable[str],
    models: Iterable[str],
    ratios: Iterable[int],
    dtypes: Iterable[str],
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row a distinct result, with the cases it serves."""
    rows: dict[tuple, dict[str, Any]] = {}
    for arch in archs:
        for dtype in dtypes:
            for name in models:
                for k in ratios:
                    for form in FORMS if (name, k, dtype) == ALL_FORMS else FORMS[:1]:
                        case = f"{name} k={k} {dtype}" + (f" {form}" if form != "plain" else "")
                        tell(f"{arch} {case}")
                        call = sublayer(MODELS[name], k, DTYPES[dtype], form)
                        for row in compile_call(arch, call):
                            of = rows.setdefault(tuple(row.items()), {**row, "cases": []})["cases"]
                            if case not in of:
                                of.append(case)
    return list(rows.values())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The worst of each kernel by architecture."""
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        f"Written by `python -m bench.compile_triton`, Triton {triton.__version__}; no"
        " GPU was used. The largest values over all cases; the smallest number of matrix"
        " instructions (HMMA, HGMMA, v_mfma; kernels with a dash multiply no matrices).",
        "",
        "| arch | kernel | results | registers | stack | spills | shared, bytes | matrix |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arch in TARGETS:
        kernels = sorted({row["kernel"] for row in rows if row["arch"] == arch})
        for kernel in kernels:
            some = [row for row in rows if row["arch"] == arch and row["kernel"] == kernel]
            worst = [
                max(row[c] for row in some) for c in ("registers", "stack", "spills", "shared")
            ]
            least = "-" if kernel in PLAIN_KERNELS else min(row["matrix"] for row in some)
            cells = [arch, kernel, len(some), *worst, least]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ratio", nargs="+", type=int, default=list(RATIOS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"a folder (default {OUTPUT})")
    chosen = parser.parse_args(arguments)
    rows = table(chosen.arch, chosen.model, chosen.ratio, chosen.dtype, lambda what: print(what))
    chosen.output.mkdir(parents=True, exist_ok=True)
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
