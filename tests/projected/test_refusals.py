"""What cannot come out right is refused, and the model is as it was."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import variator_kernels as vk
from tests.projected import cases
from tests.sites.tiny import snapshot


def refused(model, match: str, error=ValueError, batches=None, **settings):
    batches = [cases.batch(model)] if batches is None else batches
    before = snapshot(model)
    values = [p.clone() for p in model.parameters()]
    with pytest.raises(error, match=match):
        vk.project(model, batches, **settings)
    assert snapshot(model) == before
    assert all(map(torch.equal, values, model.parameters()))


@pytest.mark.parametrize("params", [0, 1.01, -0.5, float("nan"), True, "half"])
def test_shares(params):
    match = r"params must be a share in \(0, 1\], got"
    refused(cases.model("llama"), match, params=params)


def test_arguments():
    model = cases.model("llama")
    refused(model, "either params, a share .* must be given, got params=0.5", params=0.5, hidden=16)
    refused(model, "either params, a share .* must be given, got params=None")
    refused(model, "hidden must be <= 32, got 64", hidden=64)
    refused(model, "ffn must be >= 1, got 0", ffn=0)
    refused(model, "start must be one of", params=0.5, start="random")
    refused(model, "importance must be one of", params=0.5, importance="gradient")
    refused(model, "untie must be False for a model whose head is not", params=0.5, untie=True)
    refused(model, "params must be at least 0.0", params=0.001)
    refused(model, "batches must hold at least one batch", batches=[], params=0.5)
    refused(model, "batches must have input_ids", batches=[{"x": 1}], params=0.5)
    ids = torch.ones(2, 4, dtype=torch.long)
    empty = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    square = {"input_ids": ids, "attention_mask": torch.zeros(2, 1, 4, 4)}
    refused(model, r"attention_mask must have shape \[2, 4\]", batches=[square], params=0.5)
    lists = [{"input_ids": [[1, 2]]}]
    refused(model, "input_ids must be a tensor, got list", TypeError, batches=lists, params=0.5)
    refused(model, "batches must have real tokens", batches=[empty], params=0.5)
    refused(model, "batches must have real tokens", batches=[{"input_ids": ids[:0]}], params=0.5)
    refused(model, "batches must hold mappings", TypeError, batches=[torch.ones(2)], params=0.5)
    with pytest.raises(ValueError, match="batches must be given, start 'pca' looks at"):
        vk.project(model, params=0.5)


def test_sizes_that_the_configuration_refuses():
    model = cases.model("llama")
    kind = type(model.config)
    try:
        kind(hidden_size=18, num_attention_heads=4)
    except Exception:
        refused(model, "hidden must be a size that LlamaConfig accepts, such as 16 or 20, got 18",
                hidden=18)  # fmt: skip
    else:
        pytest.skip(f"transformers {transformers.__version__} accepts it")


def test_families():
    refused(cases.model("bert"), "hidden must be 24 .* FFN width alone", hidden=16)
    refused(cases.model("bert"), "importance must be 'activation' or 'weight'", ffn=20,
            importance="gated")  # fmt: skip
    refused(cases.model("t5-relu"), "untie must be False for a 't5'", params=0.7, untie=True)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=40)
    inputs = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    refused(transformers.GPT2Model(config), "model_type in .*'llama'.* 'gpt2'", batches=inputs,
            params=0.5)  # fmt: skip
    refused(nn.Linear(2, 2), "must be of transformers", batches=inputs, params=0.5)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        vk.project(3, inputs, 0.5)
    model = cases.model("t5-relu")
    given = [{"input_ids": cases.batch(model)["input_ids"]}]
    refused(model, "labels or decoder_input_ids for an encoder-decoder", batches=given, params=0.5)


def test_models_that_are_no_longer_plain():
    model = cases.model("llama")
    small = cases.project(model)
    with pytest.raises(ValueError, match="plain floating point weight"):
        cases.project(small)
    with pytest.raises(ValueError, match=r"merged before it is patched.*vk\.patch\(vk\.merge"):
        vk.patch(small)
    vk.patch(model)
    refused(model, "must not be patched", params=0.5)
    vk.unpatch(model)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="meta device"):
        cases.project(empty)
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match="plain floating point weight, a Sequential"):
        cases.project(model)
    other = cases.model("llama")
    other.extra = nn.Linear(32, 3).double()
    refused(other, r"parameters that its class makes, .*extra", params=0.5)
    other = cases.model("llama")
    other.__class__ = type("Mine", (type(other),), {})
    refused(other, "must be one of .*LlamaForCausalLM.* got a Mine", params=0.5)


def test_not_finite():
    model = cases.model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    for start in ("select", "pca"):
        refused(model, "not finite", FloatingPointError, params=0.5, start=start)


def test_save_pretrained_of_a_projected_model_writes_the_merged_one(tmp_path):
    small = cases.project(cases.model("qwen2"))
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path, dtype=torch.float64)
    inputs = cases.batch(small)
    torch.testing.assert_close(cases.output(loaded, inputs), cases.output(small, inputs))


def test_modes_stay():
    model = cases.model("llama").train()
    small = cases.project(model, start="pca")
    assert model.training and model.model.layers[0].training and small.training
    assert not cases.project(model.eval()).training
