"""A merged model is plain: what it says is what training said, and plain transformers loads it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.projected import cases
from variator_kernels.methods.projected.composition import composed

PLAIN = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    saved = torch.load(folder + "/truth.pt")
    kind = getattr(transformers, saved["class"])
    model, found = kind.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    wrong = [found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    assert not any(wrong), (folder, wrong)
    with torch.no_grad():
        out = model.eval()(**saved["inputs"])
    out = out.logits if "logits" in out else out[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved["weights"][name]), (folder, name)
    # Where weights begin in memory may change the order of sums.
    torch.testing.assert_close(out, saved["output"], rtol=1e-13, atol=1e-13, msg=folder)
assert "variator_kernels" not in sys.modules
print("all equal")
"""


def trained(small: nn.Module, seed: int = 0) -> nn.Module:
    """Other values than the first ones, everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in small.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.02 * noise).to(parameter.dtype))
    return small


@pytest.fixture(scope="module")
def smalls():
    made = {}
    for name in cases.ALL:
        model = cases.model(name)
        made[name] = trained(vk.project(model, [cases.batch(model)], 0.8, split="alike"))
    untied = cases.model("t5-gated-gelu")  # as T5 1.1's is
    untied.lm_head.weight = nn.Parameter(torch.randn_like(untied.lm_head.weight) * 0.1)
    if hasattr(untied.config, "scale_decoder_outputs"):  # transformers 5
        untied.config.scale_decoder_outputs = False
    else:
        untied.config.tie_word_embeddings = False
    made["t5-untied"] = trained(vk.project(untied, [cases.batch(untied)], 0.8, start="select"))
    model = cases.model("llama", tie_word_embeddings=True)
    made["llama-tied"] = trained(cases.project(model, untie=False))
    made["llama-untied"] = trained(cases.project(model, untie=True))
    return made


def test_says_what_training_said(smalls):
    for name, small in smalls.items():
        inputs, keys = cases.batch(small, 3), set(small.state_dict())
        merged = vk.merge(small)
        expected = cases.output(small, inputs)
        got = cases.output(merged, inputs)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=name)
        assert not any("parametrizations" in key for key in merged.state_dict())
        assert keys == set(small.state_dict())
        made = small.variator_projection
        assert sum(p.numel() for p in merged.parameters()) == made.parameters
        assert 0.6 < made.share <= 0.8, name


def test_fresh_process(smalls, tmp_path):
    folders = []
    for name, small in smalls.items():
        merged, inputs = vk.merge(small), cases.batch(small, 3)
        folder = tmp_path / name
        merged.save_pretrained(folder)
        truth = {"class": type(merged).__name__, "inputs": inputs}
        truth |= {"output": cases.output(merged, inputs), "weights": merged.state_dict()}
        torch.save(truth, folder / "truth.pt")
        folders.append(str(folder))
    ran = subprocess.run(
        [sys.executable, "-c", PLAIN, *folders], capture_output=True, text=True, timeout=300
    )
    assert ran.stdout.strip() == "all equal", ran.stderr[-2000:]


def test_the_configuration_says_whether_the_head_is_the_embedding(smalls, tmp_path):
    """Written as tied with a head of its own, loading would overwrite one by the other."""
    for name, tied in (("llama-tied", True), ("llama-untied", False), ("gemma", False)):
        merged = vk.merge(smalls[name])
        merged.save_pretrained(tmp_path / name)
        says = json.loads((tmp_path / name / "config.json").read_text())
        assert says.get("tie_word_embeddings", tied) is tied
        same = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
        assert same is tied


def test_training_updates_what_a_merged_model_says():
    model = cases.model("llama", tie_word_embeddings=True)
    small = cases.project(model, untie=False)
    inputs = cases.batch(model)
    before = cases.output(small, inputs)
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    originals = copy.deepcopy(model.state_dict())
    for _ in range(3):
        small(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad is not None for p in small.parameters())
        optimizer.step()
        optimizer.zero_grad()
    after = cases.output(small, inputs)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(cases.output(vk.merge(small), inputs), after)
    for name, value in model.state_dict().items():
        assert torch.equal(value, originals[name]), name


@pytest.mark.parametrize("start", ["select", "pca"])
def test_every_matrix_trains_factors_of_its_own(start):
    """In float64 too, where a start's factors need no conversion."""
    model = cases.model("llama")
    parameters = list(cases.project(model, start=start).parameters())
    taken = {p.data_ptr() for p in model.parameters()}
    own = {p.data_ptr() for p in parameters}
    assert len(own) == len(parameters) and not own & taken


def test_bf16_by_the_rule():
    """Merged and unmerged alike: at most twice plain PyTorch's error in bf16."""
    model = cases.model("llama")
    small = trained(cases.project(model))
    inputs = cases.batch(small, 3)
    truth = cases.output(vk.merge(small), inputs)
    low = copy.deepcopy(small).to(torch.bfloat16)
    plain = vk.merge(small).to(torch.bfloat16)
    error = (cases.output(plain, inputs).double() - truth).abs().max()
    for made in (low, vk.merge(low)):
        assert (cases.output(made, inputs).double() - truth).abs().max() <= 2 * error + 1e-6


def test_copies_and_state_dicts():
    small = trained(cases.project(cases.model("llama", tie_word_embeddings=True), untie=False))
    inputs = cases.batch(small, 3)
    expected = cases.output(small, inputs)
    twin = copy.deepcopy(small)
    assert torch.equal(cases.output(twin, inputs), expected)
    assert len(list(composed(twin))) == len(list(composed(small)))
    fresh = cases.project(cases.model("llama", tie_word_embeddings=True), untie=False)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(cases.output(fresh, inputs), expected)
    out = small.generate(input_ids=inputs["input_ids"][:, :5], max_new_tokens=3, do_sample=False)
    again = vk.merge(small).generate(
        input_ids=inputs["input_ids"][:, :5], max_new_tokens=3, do_sample=False
    )
    assert torch.equal(out, again)


def test_only_projected_models_are_merged():
    with pytest.raises(ValueError, match=r"small must be a model that vk\.project made"):
        vk.merge(cases.model("llama"))


def test_a_write_through_data_is_merged():
    small = cases.project(cases.model("llama", tie_word_embeddings=True), untie=False)
    inputs = cases.batch(small, 3)
    before = cases.output(small, inputs)  # W_C is built
    twin = copy.deepcopy(small)
    with torch.no_grad():
        for uncounted, counted in zip(small.parameters(), twin.parameters(), strict=True):
            uncounted.data.mul_(1.25)
            counted.mul_(1.25)
    merged = vk.merge(small)
    for name, value in vk.merge(twin).state_dict().items():
        assert torch.equal(value, merged.state_dict()[name]), name
    expected = cases.output(twin, inputs)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(cases.output(merged, inputs), expected)


def test_settings_of_generation_are_its_own():
    model = cases.model("llama")
    model.generation_config.max_new_tokens = 5
    small = cases.project(model)
    merged = vk.merge(small)
    small.generation_config.max_new_tokens = 6
    merged.generation_config.max_new_tokens = 7
    assert [m.generation_config.max_new_tokens for m in (model, small, merged)] == [5, 6, 7]
    assert vk.merge(small).generation_config.max_new_tokens == 6
