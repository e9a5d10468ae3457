"""Multiply-adds of a prompt, against loops."""

import pytest
import torch

import variator_kernels as vk
from tests.decoders import tiny


@pytest.mark.parametrize("n", [1, 2, 5, 29, 40])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma"])
def test_against_loops(family, n):
    k, window, kept, r = 3, 5, 2, 4
    model = tiny.model(family)
    vk.patch(model, {"ffn": k, "attention_kv": k}, bottleneck=r, window=window, keep_first=kept)
    got = vk.flops.count(model, 2, n, {"ffn": k, "attention_kv": k})
    d, f, keys = tiny.D, 48, tiny.KEY_HEADS * tiny.D // tiny.HEADS
    groups = max(0, n - kept) // k if n > 1 else 0
    dense = n - groups * k
    assert got.multiply_adds.ffn == 2 * tiny.LAYERS * (groups + dense) * 3 * d * f
    complete = max(0, n - kept) // k
    queries = {"gemma": 8 * tiny.HEADS}.get(family, d)
    keys = {"gemma": 8 * tiny.KEY_HEADS}.get(family, keys)
    projections = n * 2 * d * queries + (n + complete) * 2 * d * keys
    assert got.multiply_adds.attention_projections == 2 * tiny.LAYERS * projections
    pairs = 0
    for number in range(n):
        pairs += min(number + 1, kept)
        if number >= kept:
            seen, plain = tiny.seen(vk_scheme(k, window, kept), number - kept)
            pairs += seen + len(plain)
    assert got.multiply_adds.attention_core == 2 * tiny.LAYERS * 2 * pairs * queries
    merge = (groups * k + complete * k) * (k * d + d)
    assert got.multiply_adds.merge == 2 * tiny.LAYERS * merge
    decompress = (2 * groups * k + groups) * r * d
    assert got.multiply_adds.decompress == 2 * tiny.LAYERS * decompress
    assert got.dense_multiply_adds.attention_core == 2 * tiny.LAYERS * n * (n + 1) * queries


def vk_scheme(*numbers):
    from variator_kernels.ops.self_attention import Scheme

    return Scheme(*numbers)


def test_smollm2():
    """What a prompt of 2,048 tokens leaves at k=4 (issue: 1 / 1.57 and 1 / 2.31)."""
    import transformers

    with torch.device("meta"):
        config = transformers.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.LlamaModel(config)
    upper = dict.fromkeys(range(15, 30), 4)
    half = vk.flops.count(model, 1, 2048, {"ffn": upper, "attention_kv": 4})
    whole = vk.flops.count(model, 1, 2048, {"ffn": 4, "attention_kv": 4})
    assert 1 / half.fraction_left == pytest.approx(1.57, abs=0.01)
    assert 1 / whole.fraction_left == pytest.approx(2.31, abs=0.01)
