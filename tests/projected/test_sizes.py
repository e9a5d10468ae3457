"""Sizes for a share of the parameters: the count is the truth, and the share is met."""

from __future__ import annotations

import pytest
import torch
import transformers

import variator_kernels as vk
from tests.projected import cases
from variator_kernels.methods.projected import sizes
from variator_kernels.sites.layout import layout_of


def large(kind: str, **settings):
    """A model of real sizes, without values."""
    with torch.device("meta"):
        prefix = {"llama": "Llama", "qwen2": "Qwen2", "t5": "T5"}[kind]
        head = "ForConditionalGeneration" if kind == "t5" else "ForCausalLM"
        config = getattr(transformers, f"{prefix}Config")(**settings)
        return getattr(transformers, f"{prefix}{head}")(config)


SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
T5_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 2, "num_heads": 12}


def chosen(model, monkeypatch, share, untied=False):
    from variator_kernels.sites import layout

    monkeypatch.setattr(layout, "check_values", lambda model: None)
    found = layout_of(model)
    made = sizes.chosen(model, found, share, None, None, untied)
    total = sizes.parameters(model, found, sizes.sizes_of(model, found))
    return made, sizes.parameters(model, found, made, untied) / total


@pytest.mark.parametrize("share", [0.75, 0.5, 0.33])
@pytest.mark.parametrize("kind, settings", [("llama", SMOLLM2), ("t5", T5_BASE)])
def test_shares_of_real_sizes(kind, settings, share, monkeypatch):
    model = large(kind, **settings)
    made, found = chosen(model, monkeypatch, share)
    assert share - 0.03 <= found <= share
    if kind == "t5":
        assert made.hidden % 64 == 0 and made.ffn % 64 == 0
    else:
        heads = transformers.__version__ >= "5"  # before, any size is accepted
        assert made.hidden % (9 if heads else 32) == 0 and made.ffn % 64 == 0


def test_all_of_it_stays():
    model = cases.model("llama")
    for params, start in ((1.0, "select"), (1, "pca")):
        small = vk.project(model, [cases.batch(model)], params, start=start)
        assert small.variator_projection.share == 1.0
        inputs = cases.batch(model)
        assert torch.equal(cases.output(small, inputs), cases.output(model, inputs))


def test_sizes_that_are_not_given_stay():
    small = cases.project(cases.model("qwen2"), hidden=16)
    assert (small.config.hidden_size, small.config.intermediate_size) == (16, 48)
    small = cases.project(cases.model("qwen2"), ffn=16)
    assert (small.config.hidden_size, small.config.intermediate_size) == (32, 16)


def test_report(caplog):
    model = cases.model("llama", tie_word_embeddings=True)
    with caplog.at_level("INFO", logger="variator_kernels"):
        small = vk.project(model, [cases.batch(model)], 0.7, split="alike")
    made = small.variator_projection
    total = sum(p.numel() for p in vk.merge(small).parameters())
    assert made.parameters == total
    assert made.original_parameters == sum(p.numel() for p in model.parameters())
    assert f"{total:,} parameters, {100 * made.share:.1f} %" in caplog.text
    assert f"hidden size 32 -> {small.config.hidden_size}" in str(made)
    assert "a matrix of its own now" in caplog.text and made.untied
