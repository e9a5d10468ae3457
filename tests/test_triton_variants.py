"""Triton compiles a kernel once, whatever sizes a service is asked for: seconds each, otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton_names import ATTENTION, sublayer_kernels

ROOT = Path(__file__).parents[1]
K = {"t5-base": 4, "bert-base": 16, "llama-7b": 2}
pytest.importorskip("triton", reason="Triton is not installed")

# Prints a line of JSON for what is counted: how many sizes, and how many keys of each kernel.
PRELUDE = """
import json, random
import torch
from bench import internals
from bench.tools.triton_cases import ATTENTIONS, MODELS, attention, sublayer
from bench.tools.triton_compiler import PROCESSORS, specialising

drawn = random.Random(0)

def upto(most):
    # As often small as large, as often a multiple of 16 as not.
    value = int(most ** drawn.random())
    return value if drawn.random() < 0.5 else 16 * max(1, value // 16)

def keys(arch, call, sizes):
    with specialising(arch) as found:
        for size in sizes:
            call(size)()
    return found

def tell(case, sizes, found):
    counts = {name: len(of) for name, of in found.items()}
    print(json.dumps({"case": case, "sizes": sizes, "keys": counts}))
"""
# Two of the launch table's kernels ask, each for itself, whether multiprocessors would idle: the
# tiles of tokens and those of the first product. So there are three classes of sizes, here by
# arithmetic of their own; sizes whose class depends on the form of groups are left out.
SUBLAYERS = """
launches = internals.triton_launches

def launches_with_a_mask_anywhere(x, plugin, ffn, mask, offsets, **more):
    if mask is not None and x.shape[0] % 2:  # a part of another tensor, at an odd address
        mask = mask.new_empty(mask.numel() + 1)[1:].view(mask.shape)
    return launches(x, plugin, ffn, mask, offsets, **more)

internals.triton_launches = launches_with_a_mask_anywhere

def class_of(arch, model, k, form, rows, n):
    few_tokens = -(-rows * n // 64) < PROCESSORS[arch]
    more = 4 if form == "kept" else 0  # for tokens outside, and one
    groups = -(-rows * n // k), rows * ((n + 2 * (k - 1)) // k + more) + 1  # the fewest, the most
    few = [4 * -(-g // 128) * -(-model.f // 256) < PROCESSORS[arch] for g in groups]
    if few[0] != few[1]:
        return "either"
    return {(1, 1): "few", (0, 1): "between", (0, 0): "many"}[few[0], few_tokens]

def sizes_of(arch, model, k, form):
    last = 64 * (PROCESSORS[arch] - 1)  # tokens that are few
    found = {"few": {}, "between": {}, "many": {}}
    if form == "kept":
        del found["between"]  # that class is the product's, which knows no form
    corners = [(1, 1), (1, k - 1), (1, k), (1, 16 * k), (16, 1), (16, k), (17, k), (3, 5),
               (1, last), (1, last + 1), (last // 8, 8), (last + 1, 1), (1, 65536)]
    for size in [*corners, *((upto(1024), upto(65536)) for _ in range(4000))]:
        of = found.get(class_of(arch, model, k, form, *size), {})
        if len(of) < 50 and size[0] * size[1] <= 65536:
            of[size] = True
    return {name: list(sizes) for name, sizes in found.items() if sizes}

# Lists of groups take ten times as long to make as the rest: each form of them for one model.
for arch, name, k, forms in (
    ("sm_90", "t5-base", 4, ("plain", "packed")),
    ("sm_90", "bert-base", 16, ("plain", "masked", "kept")),
    ("sm_90", "llama-7b", 2, ("plain",)),
    ("gfx942", "t5-base", 4, ("masked",)),
    ("gfx942", "bert-base", 16, ("plain",)),
):
    for form in forms:
        model, together = MODELS[name], {}
        call = lambda size: sublayer(model, k, torch.bfloat16, form, size=(*size, 64))
        for which, sizes in sizes_of(arch, model, k, form).items():
            found = keys(arch, call, sizes)
            tell([arch, name, form, which], sizes, found)
            for kernel, of in found.items():
                together.setdefault(kernel, set()).update(of)
        tell([arch, name, form, "all"], [], together)
"""
# Queries that do not fill a tile are a class of their own.
ATTENTIONS = """
for arch, name in [*(("sm_90", name) for name in ATTENTIONS), ("gfx942", "t5-base")]:
    model = ATTENTIONS[name]
    call = lambda size: attention(model, torch.bfloat16, size)
    most = 16 // (model.heads // model.kv_heads)  # queries of a step
    steps = {(1, 1, 1): 1, (16, 1, 16): 1, (3, most, 1): 1, (1, most, 33): 1}
    long = {(1, most + 1, 1): 1, (1, 17, 1): 1, (16, 4096, 1024): 1}
    while len(steps) < 50:
        steps[upto(64), drawn.randint(1, most), upto(4096)] = 1
    while len(long) < 50:
        long[upto(64), max(most + 1, upto(4096)), upto(4096)] = 1
    for which, sizes in (("steps", list(steps)), ("long", list(long))):
        tell([arch, name, "attention", which], sizes, keys(arch, call, sizes))
"""


def once(names):
    """Of each kernel one key; weight_sums is launched for the merge and for the adapter."""
    return {name: 2 if name == "weight_sums_kernel" else 1 for name in names}


def check_sizes(case, sizes):
    """As many as claimed, and all that Triton tells apart: 1, multiples of 16, others."""
    assert len(sizes) == len(set(map(tuple, sizes))) >= 50, case
    assert any(size[0] == 1 for size in sizes), case
    for values in zip(*sizes, strict=True):
        assert len(set(values)) >= 10 or case[-1] == "steps", (case, values)
        multiples = sum(value % 16 == 0 for value in values)
        assert len(values) - multiples >= 10, (case, values)
        assert multiples >= 10 or max(values) <= 16, (case, values)


def test_a_kernel_is_compiled_once_a_form_and_class_of_sizes():
    # A process of its own: in this one the kernels are interpreted.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = PRELUDE + SUBLAYERS + ATTENTIONS
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    seen = []
    for row in map(json.loads, done.stdout.splitlines()):
        arch, model, form, which = case = row["case"]
        kernels = once(ATTENTION if form == "attention" else sublayer_kernels(model, K[model]))
        if which == "all":
            # Few and many: two sets of settings at most, though sizes have three classes.
            assert row["keys"].keys() == kernels.keys(), case
            assert max(row["keys"].values()) == 2, row
        else:
            assert row["keys"] == kernels, case
            check_sizes(case, row["sizes"])
            seen.append((arch, form, which))
    classes = {"few", "between", "many"}
    for arch, forms in (("sm_90", ("plain", "masked", "packed")), ("gfx942", ("plain", "masked"))):
        assert {(arch, form, which) for form in forms for which in classes} <= set(seen)
    assert {("sm_90", "kept", which) for which in ("few", "many")} <= set(seen)
    assert [seen.count(("sm_90", "attention", which)) for which in ("steps", "long")] == [6, 6]
    assert [seen.count(("gfx942", "attention", which)) for which in ("steps", "long")] == [1, 1]
