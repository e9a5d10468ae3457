"""The start "select" is exactly the hard-pruned model."""

from __future__ import annotations

import copy

import pytest
import torch

import variator_kernels as vk
from tests.projected import cases
from variator_kernels.sites.layout import layout_of
from variator_kernels.sites.residual import FFN, HIDDEN


def pruned(model, hidden: int, ffn: int, importance: str):
    """Hard pruning, by indices; nothing of ours but which dimensions a parameter has."""
    layout, own = layout_of(model), dict(model.named_parameters(remove_duplicate=False))
    config = copy.deepcopy(model.config)
    d = getattr(config, layout.hidden_field)
    if hidden < d and layout.residual.head_size == "head_dim":
        config.head_dim = getattr(config, "head_dim", None) or d // config.num_attention_heads
    setattr(config, layout.hidden_field, hidden)
    setattr(config, layout.ffn_field, ffn)
    assert importance == "weight"

    def largest(names, along, count):
        squares = 0
        for name in names:
            axis = layout.roles[name].index(along)
            squares = squares + own[name].detach().square().sum(1 - axis)
        return squares.argsort(descending=True)[:count].sort().values

    matrices = [name for name, roles in layout.roles.items() if len(roles) == 2]
    kept = {}
    if hidden < d:
        along = [name for name in matrices if HIDDEN in layout.roles[name]]
        kept[HIDDEN] = largest(along, HIDDEN, hidden)
    small = type(model)(config).double().eval()
    if not layout.tied and layout.head:
        small.get_submodule(layout.head).weight = torch.nn.Parameter(
            small.get_submodule(layout.head).weight.detach().clone()
        )
    inner = {}
    for part in layout.sublayers:
        if part.inner:
            names = [f"{name}.weight" for name in (*part.reads, part.writes)]
            for name in names:
                inner[name] = largest(names, FFN, ffn)
                inner[name.replace("weight", "bias")] = inner[name]
    with torch.no_grad():
        for name, parameter in small.named_parameters(remove_duplicate=False):
            value = own[name]
            for axis, role in enumerate(layout.roles.get(name, ())):
                index = inner[name] if role == FFN else kept.get(role)
                value = value if index is None else value.index_select(axis, index)
            parameter.copy_(value)
        if layout.family == "gemma":
            e = small.model.embed_tokens
            own_factor, factor = (
                getattr(m.model.embed_tokens, "embed_scale", m.config.hidden_size**0.5)
                for m in (model, small)
            )
            scale = float(own_factor) / float(factor)
            e.weight.mul_(scale)
            if not layout.tied:
                return small
            small.model.norm.weight.copy_((small.model.norm.weight + 1) / scale - 1)
        scaled = getattr(model.config, "scale_decoder_outputs", model.config.tie_word_embeddings)
        if layout.family == "t5" and scaled:
            small.decoder.final_layer_norm.weight.mul_((hidden / d) ** 0.5)
    return small


@pytest.mark.parametrize("name", cases.ALL)
def test_equals_the_hard_pruned_model(name):
    model = cases.model(name)
    layout = layout_of(model)
    d = getattr(model.config, layout.hidden_field)
    sizes = {"ffn": 26} if layout.residual is None else {"ffn": 26, "hidden": d * 3 // 4}
    small = vk.project(
        model, hidden=sizes.get("hidden"), ffn=26, start="select", importance="weight"
    )
    truth, inputs = pruned(model, sizes.get("hidden", d), 26, "weight"), cases.batch(model, 2)
    expected, merged = cases.output(truth, inputs), vk.merge(small)
    # Gemma's norm rounds to fp32 within; its weights differ by a last bit, where they are folded.
    near = {"rtol": 1e-6, "atol": 1e-6} if name == "gemma" else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(cases.output(small, inputs), expected, **near)
    torch.testing.assert_close(cases.output(merged, inputs), expected, **near)
    factor = getattr(merged.get_input_embeddings(), "embed_scale", 1.0)
    theirs = getattr(truth.get_input_embeddings(), "embed_scale", 1.0)
    for key, value in merged.state_dict().items():
        if "embed_tokens" in key or (key == "lm_head.weight" and layout.tied):
            value = value * (factor / theirs)
        if name == "gemma" and key == "model.norm.weight":
            value = (value + 1) * (theirs / factor) - 1
        torch.testing.assert_close(value, truth.state_dict()[key], rtol=1e-10, atol=1e-10)
    # The hard-pruned model was no other's: without the last dimension it says something else.
    other = vk.project(
        model, hidden=sizes.get("hidden"), ffn=25, start="select", importance="weight"
    )
    assert not torch.allclose(cases.output(other, inputs), expected)


def test_importance_by_activation():
    """Mean absolute values, with loops."""
    model = cases.model("llama")
    inputs, found = cases.batch(model), {}
    layer = model.model.layers[1]
    hooks = [
        layer.mlp.gate_proj.register_forward_hook(lambda m, a, o: found.update(activation=o)),
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: found.update(gated=a[0])),
    ]
    norms = [m for n, m in model.named_modules() if n.endswith("norm")]
    hidden = []
    hooks += [m.register_forward_hook(lambda m, a, o: hidden.append(o)) for m in norms]
    norms += [m for n, m in model.named_modules() if n.endswith("layernorm")]
    hooks += [m.register_forward_hook(lambda m, a, o: hidden.append(o)) for m in norms[1:]]
    cases.output(model, inputs)
    for hook in hooks:
        hook.remove()
    stream = sum(o.abs().sum((0, 1)) for o in hidden).argsort(descending=True)[:24].sort().values
    for kind in ("activation", "gated"):
        small = vk.project(model, [inputs], hidden=24, ffn=20, start="select", importance=kind)
        kept = found[kind].abs().sum((0, 1)).argsort(descending=True)[:20].sort().values
        weight = small.model.layers[1].mlp.up_proj.weight
        torch.testing.assert_close(weight, layer.mlp.up_proj.weight[kept][:, stream])
    assert small.variator_projection.importance == "gated"


def test_padding_does_not_count():
    model = cases.model("t5-relu")
    inputs = cases.batch(model)
    garbage = {k: v.clone() for k, v in inputs.items()}
    garbage["input_ids"][inputs["attention_mask"] == 0] = 7
    for start in ("select", "pca"):
        one, two = (vk.project(model, [given], 0.7, start=start) for given in (inputs, garbage))
        torch.testing.assert_close(cases.output(one, inputs), cases.output(two, inputs))
