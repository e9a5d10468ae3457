"""Modules that somebody edits, replaces, moves or removes, before patching or behind it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.decoders import tiny as decoders
from tests.sites import tiny, zoo
from tests.sites.edited_cases import IDS, MASK, PLACES, hidden, patched
from variator_kernels.sites.find import find

NUMBERS = {"scaling": 0.1, "relative_attention_max_distance": 20}


def edited(model: nn.Module, name: str) -> nn.Module:
    for module in model.modules():
        if name in vars(module):
            setattr(module, name, NUMBERS[name])
    return model


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, "scaling") for family in ("t5", "bert", "albert", "distilbert", "bart", "gte", "esm")]
    + [("t5", "relative_attention_max_distance"), ("umt5", "relative_attention_max_distance")],
)
def test_numbers_of_a_module_are_its_own(family: str, name: str) -> None:
    """Where all tokens stay whole, and at k = 1, the model computes what it did. T5's norm has its
    sums of squares in fp32, whatever the model is in."""
    if not zoo.installed(family):
        pytest.skip(f"this version of transformers has no {family}")

    def plain() -> nn.Module:
        return zoo.plain(family).double().requires_grad_(False)

    if not any(name in vars(module) for module in plain().modules()):
        pytest.skip(f"{family} of this version of transformers has no {name}")
    wanted, before = hidden(edited(plain(), name)), hidden(plain())
    assert (wanted - before).abs().max() > 1e-3, "it matters"
    late = patched(plain())
    hidden(late)  # what was described then holds no longer
    for model in (patched(edited(plain(), name)), edited(late, name)):
        torch.testing.assert_close(hidden(model), wanted, atol=1e-5, rtol=1e-4)
        vk.set_ratio(model, PLACES)
        with vk.keep(model, torch.ones_like(MASK)):
            torch.testing.assert_close(hidden(model), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_a_decoders_scaling_is_its_own(family: str) -> None:
    tokens = decoders.ids()
    wanted = edited(decoders.model(family), "scaling")(tokens).logits
    model = edited(decoders.patched(family, {"attention_kv": 3}, window=64), "scaling")
    torch.testing.assert_close(model(tokens).logits, wanted)


@pytest.mark.parametrize(
    ("family", "path", "other"),
    [
        ("bert", "output.LayerNorm", nn.RMSNorm(24, eps=1e-5)),
        ("bert", "output.LayerNorm", nn.Identity()),
        ("bert", "output.LayerNorm", nn.LayerNorm(24, elementwise_affine=False)),
        ("bert", "attention.output.LayerNorm", nn.RMSNorm(24, eps=1e-5)),
        ("t5", "layer.0.layer_norm", nn.LayerNorm(24)),
        ("t5", "layer.1.layer_norm", nn.Linear(24, 24)),
    ],
)
def test_another_kind_of_norm_is_refused(family, path, other) -> None:
    """Dense, the model's own modules may run; then they do what they are."""
    model = patched(tiny.model(family, "gelu" if family == "bert" else "relu", head="Model"
                               if family == "bert" else "EncoderModel"))  # fmt: skip
    hidden(model)
    find(model).blocks[0].set_submodule(path, other)
    try:
        dense = hidden(model)
    except TypeError as error:
        assert "was replaced by a " in str(error)
    else:
        torch.testing.assert_close(dense, hidden(vk.unpatch(copy.deepcopy(model))))
    vk.set_ratio(model, 2)
    with pytest.raises(TypeError, match=r"orm of .* was replaced by a "):
        hidden(model)


def test_a_norm_of_pytorch_in_the_place_of_t5s() -> None:
    """It says no epsilon: PyTorch takes that of its dtype."""
    model = patched(tiny.model(head="EncoderModel"))
    norm = nn.RMSNorm(24)
    for block in find(model).blocks:
        norm.load_state_dict(block.layer[1].layer_norm.state_dict())
        block.layer[1].layer_norm = copy.deepcopy(norm)
    dense = hidden(vk.unpatch(copy.deepcopy(model)))
    vk.set_ratio(model, 2)
    with vk.keep(model, torch.ones_like(MASK)):
        torch.testing.assert_close(hidden(model), dense, atol=1e-4, rtol=1e-4)


def test_the_same_kind_of_norm_takes_its_place() -> None:
    model = patched(tiny.model("bert", "gelu"))
    before = hidden(model)
    block = find(model).blocks[0]
    norm = nn.LayerNorm(24, eps=block.output.LayerNorm.eps)
    norm.load_state_dict(block.output.LayerNorm.state_dict())
    block.output.LayerNorm = norm
    assert torch.equal(hidden(model), before)


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.encoder.layer


@pytest.mark.parametrize("cut", [True, False], ids=["removed", "moved"])
def test_layers_that_are_no_longer_where_they_were(cut: bool, tmp_path) -> None:
    """Levels, plans and files name them by number."""
    model = patched(tiny.model("bert", "gelu"))
    layers = list(layers_of(model))
    model.encoder.layer = nn.ModuleList(layers[:1] if cut else layers[::-1])
    hidden(model)
    for call in (
        lambda: vk.save_plugins(model, tmp_path / "plugins"),
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: vk.describe(model),
        lambda: vk.flops.count(model, length=8),
        lambda: vk.plan(model, cost=0.7, batches=[{"input_ids": IDS, "attention_mask": MASK}]),
    ):
        with pytest.raises(ValueError, match="layers must be those that were patched"):
            call()
    assert not (tmp_path / "plugins").exists()
    vk.unpatch(model)
    vk.save_plugins(patched(model), tmp_path / "plugins")


def test_a_layer_more_or_twice_is_refused() -> None:
    for change in (lambda own: [*own, copy.deepcopy(own[0])], lambda own: [own[0], own[0]]):
        model = patched(tiny.model("bert", "gelu"))
        model.encoder.layer = nn.ModuleList(change(list(layers_of(model))))
        with pytest.raises(ValueError, match="layers must be those that were patched"):
            vk.describe(model)


def test_plugins_are_not_loaded_into_layers_that_moved(tmp_path) -> None:
    model = patched(tiny.model("bert", "gelu"))
    vk.save_plugins(model, tmp_path)
    before = [p.clone() for p in vk.plugin_parameters(model)]
    layers = list(layers_of(model))
    model.encoder.layer = nn.ModuleList(layers[::-1])
    with pytest.raises(ValueError, match="layers must be those that were patched"):
        vk.load_plugins(model, tmp_path)
    model.encoder.layer = nn.ModuleList(layers)
    for ours, theirs in zip(vk.plugin_parameters(model), before, strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_bias_that_layers_share_is_made_in_one_way() -> None:
    """transformers makes it in the first layer; where that is compressed, the next one does."""
    model = patched(tiny.model(head="EncoderModel").double())
    inner = [block.layer[0].SelfAttention for block in model.encoder.block]
    inner[0].relative_attention_max_distance = 20
    vk.set_ratio(model, 2)
    hidden(model)
    vk.set_ratio(model, {"attention_kv": {0: 2}})
    with pytest.raises(ValueError, match="max_distance must be the same in all layers"):
        hidden(model)
    inner[0].relative_attention_num_buckets = 16
    vk.set_ratio(model, 2)
    with pytest.raises(ValueError, match="num_buckets must be 32, the rows of the table"):
        hidden(model)


def test_shared_layers_are_where_they_were() -> None:
    model = vk.patch(zoo.plain("albert"), 2, (2,))
    assert "albert" in vk.describe(model)


def test_importing_the_package_recompiles_nothing() -> None:
    """transformers makes a list of layers anew in each forward of a decoder."""
    model, graphs = decoders.model("llama"), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for _ in range(4):
            compiled(decoders.ids(), use_cache=False)
    assert len(graphs) == 1
