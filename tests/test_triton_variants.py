"""Triton compiles a kernel once, whatever sizes a service is asked for: seconds each, otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton", reason="Triton is not installed")

PRELUDE = """
import random
import torch
from bench.tools.triton_cases import ATTENTIONS, MODELS, attention, sublayer
from bench.tools.triton_compiler import specialising

def one_a_kernel(what, call, sizes):
    with specialising("sm_90") as found:
        call(sizes[0])()
        first = {name: set(keys) for name, keys in found.items()}
        for size in sizes:
            call(size)()
            for name, keys in found.items():
                new = keys - first.get(name, set())
                assert not new, f"{what}, {name}: compiled again for {size}"
    assert first, what
    print(what, {name: len(keys) for name, keys in first.items()})

lengths = random.Random(0).sample(range(1, 2000), 48) + [1, 16]
"""
# Rows and tokens on both sides of what is few, in every form that groups have.
SUBLAYERS = """
for form in ("plain", "masked", "packed", "kept"):
    for model, k in (("t5-base", 4), ("bert-base", 16), ("llama-7b", 2)):
        call = lambda size: sublayer(MODELS[model], k, torch.bfloat16, form, size=(*size, 64))
        few = [(1 + n % 3, n) for n in lengths[:-1]]
        many = [(128, n + 300) for n in lengths]
        one_a_kernel(f"{model} {form} few", call, [s for s in few if s[0] * s[1] <= 256])
        one_a_kernel(f"{model} {form} many", call, many)
"""
ATTENTION = """
for name, model in ATTENTIONS.items():
    call = lambda size: attention(model, torch.bfloat16, size)
    shared = model.heads // model.kv_heads
    long = [(1 + n % 5, n + 17, n // 4 + 1) for n in lengths]
    one_a_kernel(name, call, long)
    one_a_kernel(f"{name}, a step", call, [(1 + n % 5, 1, n) for n in lengths])
"""


def test_a_kernel_is_compiled_once_a_form_and_class_of_sizes():
    # A process of its own: in this one the kernels are interpreted.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = PRELUDE + SUBLAYERS + ATTENTION
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'group_merge_kernel': 1," in done.stdout
    attention = "'attention_kernel': 1, 'query_gradient_kernel': 1, 'key_gradient_kernel': 1"
    assert attention in done.stdout
