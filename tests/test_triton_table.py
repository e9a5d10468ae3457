"""The committed table of compiled Triton kernels: every kernel of every case that docs/kernels.md
names, and nothing in it that is not as it must be."""

from __future__ import annotations

import copy
import json
from itertools import product

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench.tools import compile_triton
from tests.triton_names import ATTENTION, all_kernels, sublayer_kernels

TABLE = json.loads((compile_triton.OUTPUT / "triton.json").read_text())
WHOLE = ("sm_80", "sm_90", "gfx942")  # of the others, fewer cases
RATIOS, SIXTEEN_BITS = (2, 4, 8, 16, 32), ("bf16", "fp16")
WIDE = ("r=128", "r=256", "r=512")
FORMS = ("masked", "packed", "kept")
MODELS = ("t5-base", "t5-large", "bert-base", "llama-7b")


def claims():
    """``(arch, model, k, dtype, size or form)``: r is 64 where nothing else is said."""
    yield from product(WHOLE, MODELS, RATIOS, SIXTEEN_BITS, ("",))
    yield from product(WHOLE, ("t5-base",), (4,), ("bf16",), FORMS)
    for model, k in (("t5-base", 4), ("t5-base", 16), ("bert-base", 4)):
        yield from product(WHOLE, (model,), (k,), SIXTEEN_BITS, (*WIDE, "few"))
    yield from product(("sm_90",), ("t5-base",), (4,), ("fp32",), ("", *WIDE, "few"))
    others = ("sm_100", "sm_120", "gfx950")
    yield from product(others, ("t5-base",), RATIOS, ("bf16",), ("",))
    yield from product(others, ("t5-base",), (8,), ("fp16",), ("",))
    yield from product(others, ("t5-base",), (4, 16), ("bf16",), (*WIDE, "few"))
    yield from product(others, ("t5-base",), (4,), ("bf16",), FORMS)


def attention_claims():
    """``(arch, attention, dtype)``"""
    yield from product(WHOLE, compile_triton.ATTENTIONS, SIXTEEN_BITS)
    yield from product(("sm_100", "sm_120"), compile_triton.ATTENTIONS, ("bf16",))


def faults(rows):
    """What is missing, and what is wrong with a kernel that is there."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for case in row["cases"]:
            found.setdefault((row["arch"], case), set()).add(row["kernel"])
    wanted = {}
    for arch, model, k, dtype, size in claims():
        wanted[arch, f"{model} k={k} {dtype} {size}".strip()] = sublayer_kernels(model, k, dtype)
    for arch, name, dtype in attention_claims():
        if (arch, name) not in compile_triton.LEFT_OUT:
            wanted[arch, f"attention {name} {dtype}"] = ATTENTION
    said = [
        f"{' '.join(case)}: {sorted(kernels ^ found.get(case, set()))}"
        for case, kernels in wanted.items()
        if kernels != found.get(case, set())
    ]
    return said + [
        f"{row['arch']} {row['kernel']} ({row['cases'][0]}): {problem}"
        for row in rows
        for problem in compile_triton.problems(row)
    ]


def test_the_committed_table_is_whole_and_clean():
    assert faults(TABLE["rows"]) == []
    assert TABLE["settings"]["shared_limit"] == compile_triton.SHARED_LIMIT
    text = (compile_triton.OUTPUT / "triton.md").read_text()
    assert text.split("\n\n", 2)[2] == compile_triton.markdown(TABLE["rows"]).split("\n\n", 2)[2]


def test_every_kernel_of_the_package_is_in_it_for_every_architecture():
    for arch in WHOLE:
        here = {row["kernel"] for row in TABLE["rows"] if row["arch"] == arch}
        assert here == all_kernels(), arch
    for arch in ("sm_100", "sm_120", "gfx950"):
        here = {row["kernel"] for row in TABLE["rows"] if row["arch"] == arch}
        assert here <= all_kernels(), arch


def test_faults_are_seen():
    """The check can fail: another kernel in one's place, a case that was lost, a spill, shared
    memory, a product that is none of the tensor cores'."""
    for change, said in (
        (lambda row: row.update(kernel="row_norm_kernel"), "row_norm_kernel"),
        (lambda row: row["cases"].pop(), "group_merge_kernel"),
        (lambda row: row.update(spills=2), "2 spills"),
        (lambda row: row.update(shared=10**6), "1000000 bytes of shared memory"),
        (lambda row: row.update(by="HMMA"), "no HGMMA"),
    ):
        rows = copy.deepcopy(TABLE["rows"])
        change(
            next(
                row for row in rows
                if (row["arch"], row["kernel"]) == ("sm_90", "group_merge_kernel")
                and row["cases"][-1].startswith("t5-base k=4 bf16")
            )
        )  # fmt: skip
        assert any(said in fault for fault in faults(rows)), said
