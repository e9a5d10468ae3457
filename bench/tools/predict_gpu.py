"""The kernels on a GPU, predicted: ``python -m bench.tools.predict_gpu``.

Nothing is measured and no GPU is used. Each kernel is compiled for Hopper, and a thread block's way
through the machine code is walked (``sass_walk``): what its warps issue, products on tensor cores,
steps of shared memory and L1; besides, each tensor's bytes once. The greatest is a bound. It sees
no latency and no second read that misses L2.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import triton

from bench.harness import tables
from bench.harness.machine import RESULTS, ROOT
from bench.tools.gpu_bounds import CHIPS, predict
from bench.tools.gpu_works import PARTS, cases, size_of, works
from bench.tools.triton_cases import MODELS

PAGE = ROOT / "docs" / "gpu_predicted.md"
FIGURES = RESULTS / "compiled" / "predicted.json"
RATIOS = (2, 4, 8, 16)
BACKENDS = ("triton", "cuda")
CASE = ("part", "backend", "model", "k")


def rows(
    parts: list[str], backends: list[str], models: list[str], ratios: list[int]
) -> list[dict[str, Any]]:
    """A row a launch."""
    made = []
    for case in cases(parts, backends, models, ratios):
        part, backend, model, k = case
        size = size_of(part, model)
        where = {**dict(zip(CASE, case, strict=True)), "size": f"{size[0]} x {size[1]}"}
        for work in works(part, backend, model, k, CHIPS["H200"]):
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
HEADINGS = {
    "forward": "The forward pass",
    "few": "Few tokens: CUDA's sublayer in several launches and in one",
    "backward": "The backward pass",
    "attention": "Attention over the keys of groups",
}


def _section(part: str, made: list[dict[str, Any]]) -> str:
    place = {name: n for n, name in enumerate(MODELS)}
    some = [row for row in made if row["part"] == part]
    some.sort(key=lambda row: (place[row["model"]], row["k"], row["backend"]))
    return f"## {HEADINGS[part]}\n\n{tables.markdown(COLUMNS, some)}\n" if some else ""


LAYER = [
    *(tables.key(name, name) for name in ("model", "size", "k")),
    *map(_microseconds, ("merge", "products", "decompress", "all", "H100")),
]


def layers(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a sublayer on CUDA, in several launches: the sum of its kernels' bounds."""
    found: dict[Any, dict[str, Any]] = {}
    for row in made:
        if (row["part"], row["backend"]) != ("forward", "cuda"):
            continue
        where = {name: row[name] for name in ("model", "size", "k")}
        layer = found.setdefault(tuple(where.values()), where)
        kernel = "products" if row["kernel"].startswith("gemm") else row["kernel"].split("_")[0]
        for name, time in ((kernel, "bound"), ("all", "bound"), ("H100", "H100")):
            layer[name] = layer.get(name, 0.0) + row[time]
    whole = [layer for layer in found.values() if "products" in layer]
    place = {name: n for n, name in enumerate(MODELS)}
    return sorted(whole, key=lambda row: (place[row["model"]], row["k"]))


def _of_layers(made: list[dict[str, Any]]) -> str:
    if not (whole := layers(made)):
        return ""
    text = (
        "## A layer\n\nCUDA's four or five launches, one after the other, without gaps between "
        "them. An H100's\nsum is the last column.\n\n"
    )
    return f"{text}{tables.markdown(LAYER, whole)}\n"


def markdown(made: list[dict[str, Any]]) -> str:
    """The page: what the numbers are and are not, and the tables."""
    of = CHIPS["H200"]
    text = f"""# The kernels on a GPU, predicted

**Predicted from machine code, never measured.** No GPU was used.
`python -m bench.tools.predict_gpu` wrote it (Triton {triton.__version__}, bf16, r = 64) for an
H200 as its data sheet describes it: {of.processors} multiprocessors, {of.hertz / 1e9:g} GHz,
{of.bytes_a_second / 1e12:g} TB/s. An H100 has {CHIPS["H100"].bytes_a_second / 1e12:g} TB/s and is
otherwise the same; its bound is the last column. The same figures are in
`bench/results/compiled/predicted.json`.

One thread block's way through the machine code is walked: integers and branches are computed, so
loops run as often as they would and addresses are known; a branch on a number from memory goes
both ways, and a wait is over at once. The bound is the greatest of five: instructions issued (four
a clock and multiprocessor, by the multiprocessor that has most blocks), products on tensor cores,
128-byte steps of shared memory (bank conflicts, operands of HGMMA and what TMA brings included),
the same with L1's, and every tensor's bytes once. Not seen: latency, second reads that miss L2,
launches, barriers of the grid, what TMA writes back, that `mma.sync` reaches less than HGMMA's
rate, and the products that are cuBLAS's or PyTorch's. That HGMMA takes its operands once an
instruction and shares 128 bytes a clock with TMA is an assumption. Only cases that were walked are
listed.

By hand, for T5-base at k = 4: CUTLASS's first product has 32 x 12 tiles [128, 256], 3 a
multiprocessor. Their 3·2·128·256·768 FLOPs take 20.1 µs. Of 144 steps along the inner dimension
each takes 2·(64 + 256) rows of 32 bytes from shared memory by HGMMA and 128 + 256 into it by TMA:
36,864 steps of 128 bytes, 20.1 µs. With 128 groups a block of one launch has a tile [64, 64] of
the first product and a fifth of the sum of one of the second: 2·64·64·(768 + 640) FLOPs, 11.5 of
the 18.4 million that are counted; several launches have 12 tiles [64, 128] in the second product,
2·64·128·3072 FLOPs each, so 120 multiprocessors have nothing to do for 6.7 µs and more.
"""
    parts = [_of_layers(made), *(_section(part, made) for part in PARTS)]
    return "\n".join([text, *filter(None, parts)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ratio", nargs="+", type=int, default=list(RATIOS))
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--add", action="store_true", help="keep the figures of other cases")
    chosen = parser.parse_args(arguments)
    made = rows(chosen.part, chosen.backend, chosen.model, chosen.ratio)
    if chosen.add:
        done = {tuple(row[name] for name in CASE) for row in made}
        before = json.loads(chosen.figures.read_text())["rows"]
        made += [row for row in before if tuple(row[name] for name in CASE) not in done]
    chips = {name: chip._asdict() for name, chip in CHIPS.items()}
    content = {"predicted": True, "measured": False, "chips": chips, "rows": made}
    chosen.figures.write_text(json.dumps(content, indent=1) + "\n")
    chosen.page.write_text(markdown(made))
    print(f"written to {chosen.page} and {chosen.figures}")


if __name__ == "__main__":
    main()
