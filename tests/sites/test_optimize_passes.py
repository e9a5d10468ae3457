"""``optimize="encoder"``: dense sublayers in few passes, or as they were where more is asked."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.ops.cases import needs_cpu
from tests.sites.optimize_cases import batch, forward, plain
from variator_kernels.sites import dense
from variator_kernels.sites.find import find
from variator_kernels.sites.unchanged import check_attention

pytestmark = needs_cpu


@pytest.fixture
def fused(monkeypatch):
    """How many sublayers ran in few passes."""
    counts = {"ffn": 0, "attention": 0}

    def counted(name, run):
        def call(*args):
            y = run(*args)
            counts[name] += y is not None
            return y

        return call

    monkeypatch.setattr(dense, "feed_forward", counted("ffn", dense.feed_forward))
    monkeypatch.setattr(dense, "attention", counted("attention", dense.attention))
    return counts


@pytest.mark.parametrize("placements", [("ffn",), ("attention_kv",), ("ffn", "attention")])
@pytest.mark.parametrize("name", ["bert", "modernbert", "t5"])
def test_dense_sublayers_run_in_few_passes(name, placements, fused):
    """Wherever plugins are, and beside compressed ones; padding on either side, holes."""
    model, given = plain(name), batch()
    given["attention_mask"][0, :4] = 0
    given["attention_mask"][2, 20:23] = 0
    real = given["attention_mask"].bool()
    exact, own = (m(**given).last_hidden_state[real] for m in (plain(name).double(), model))
    classes = [type(m) for m in model.modules()]
    try:
        check_attention(find(model))
    except ValueError as error:
        pytest.skip(str(error))
    vk.patch(model, 1, (2,), 8, placements=placements, optimize="encoder")
    with torch.no_grad():
        found = model(**given).last_hidden_state[real]
    assert fused == {"ffn": 2, "attention": 2}
    allowed = 2 * (own.double() - exact).abs().max() + 1e-6
    assert (found.double() - exact).abs().max() <= allowed
    with vk.use_ratio(model, 2):
        forward(model)
    compressed = {"ffn": "ffn" in placements, "attention": placements != ("ffn",)}
    assert fused == {name: 2 if compressed[name] else 4 for name in fused}
    vk.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any("variator" in key for m in model.modules() for key in vars(m))


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_what_is_asked_for_besides_is_given(name, fused):
    """Attention weights, masks of pairs, hooks, gradients: those sublayers run as they were."""
    model = plain(name)
    twin, given = copy.deepcopy(model), batch()
    vk.patch(model, 1, (2,), 8, optimize="encoder")
    none = {"ffn": 0, "attention": 0}

    def same(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    for m in (model, twin):
        m.set_attn_implementation("eager")
    with torch.no_grad():
        found, expected = (m(**given, output_attentions=True) for m in (model, twin))
        same(found.attentions, expected.attentions)
        assert fused == none
        pairs = torch.ones(3, 1, 50, 50, dtype=torch.bool).tril()
        try:
            expected = twin(given["input_ids"], pairs).last_hidden_state
        except (ValueError, RuntimeError):  # older versions of transformers refuse such masks
            expected = None
        if expected is not None:
            same(model(given["input_ids"], pairs).last_hidden_state, expected)
        assert fused == none
        found, expected = (m(**given, output_hidden_states=True) for m in (model, twin))
        mask = given["attention_mask"].bool()
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            same(one[mask], other[mask])
        assert fused == {"ffn": 2, "attention": 2}
    seen = []
    first = find(model)
    norm = first.layers[0].layer_norm if name == "t5" else first.layers[0].output.LayerNorm
    handle = norm.register_forward_hook(lambda *_: seen.append(1))
    same(forward(model), forward(twin))
    assert seen == [1] and fused == {"ffn": 3, "attention": 4}
    handle.remove()
    with torch.no_grad():
        leaves = [m.get_input_embeddings()(given.pop("input_ids")) for m in (model,)]
    x = leaves[0].requires_grad_()
    model(inputs_embeds=x, **given).last_hidden_state.sum().backward()
    assert x.grad is not None and fused == {"ffn": 3, "attention": 4}


@pytest.mark.parametrize("name", ["t5", "modernbert"])
@pytest.mark.parametrize("way", ["hook", "module"])
def test_a_changed_inner_dropout_runs(name, way):
    """It is no dropout any more: the FFN runs as it is, at every level."""
    model = plain(name)
    owner, part = ("DenseReluDense", "dropout") if name == "t5" else ("mlp", "drop")
    for module in list(model.modules()):
        if hasattr(module, owner) and hasattr(getattr(module, owner), part):
            inner = getattr(module, owner)
            if way == "hook":
                getattr(inner, part).register_forward_hook(lambda _, args, out: 0.5 * out)
            else:
                setattr(inner, part, Half())
    expected = forward(model)
    vk.patch(model, 1, (2,), 8, optimize="encoder")
    torch.testing.assert_close(forward(model), expected, rtol=1e-4, atol=1e-4)
    reference = plain(name)
    vk.patch(reference, 2, (2,), 8, backend="reference")
    vk.set_ratio(model, 2)
    assert not torch.allclose(forward(model), forward(reference), atol=1e-3)


class Half(nn.Module):
    def forward(self, x):
        return 0.5 * x


@pytest.mark.parametrize("where", ["block", "blocks' owner", "sublayer"])
def test_a_mask_that_a_hook_puts_in_reaches_attention(where):
    model = plain("bert")
    parts = {"block": model.encoder.layer[1], "blocks' owner": model.encoder,
             "sublayer": model.encoder.layer[0].attention}  # fmt: skip
    mask = torch.ones(50, 50, dtype=torch.bool).tril().expand(3, 1, 50, 50)

    def causal(module, args, kwargs):
        if "attention_mask" in kwargs:
            return args, kwargs | {"attention_mask": mask}
        return tuple(
            mask if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args
        ), kwargs

    full = forward(model)
    parts[where].register_forward_pre_hook(causal, with_kwargs=True)
    expected = forward(model)
    vk.patch(model, 1, (2,), 8, placements=("ffn", "attention_kv"), optimize="encoder")
    torch.testing.assert_close(forward(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(full, expected, atol=1e-3)


def test_hooks_on_every_module_see_those_of_dense_sublayers():
    model = vk.patch(plain("bert"), 1, (2,), 8, optimize="encoder")
    expected, seen = forward(model), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(id(m)))
    try:
        torch.testing.assert_close(forward(model), expected, rtol=1e-4, atol=1e-4)
    finally:
        handle.remove()
    assert {id(part.intermediate.dense) for part in model.encoder.layer} <= set(seen)
