"""A whole patched encoder: mask, padding, precision, compiled and eager."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.sites.family import follow
from variator_kernels.sites.feed_forward import describe
from variator_kernels.sites.find import find


def by_hand(layer, x, plugin):
    """The specification for one row without padding, a group at a time."""
    w, k = plugin.weights(), plugin.merge.ratio
    h, rows = layer.layer_norm(x) if hasattr(layer, "layer_norm") else x, []
    for start in range(0, len(x), k):
        group = h[start : start + k]
        full = torch.cat([group, group.new_zeros(k - len(group), x.shape[-1])])
        scores = w.merge_weight @ full.flatten() + w.merge_bias
        g = scores[: len(group)].softmax(0) @ group
        u = tiny.dense(layer, g)
        for token in group:
            t = torch.tanh(w.w1 @ torch.cat([u, token]) + w.b1)
            rows.append(u + w.w2 @ t + w.b2)
    o = torch.stack(rows)
    if hasattr(layer, "lin1"):
        return o  # DistilBERT's block adds x and norms
    return layer.output.LayerNorm(x + o) if hasattr(layer, "output") else x + o


@pytest.mark.parametrize(("family", "act"), tiny.VARIANTS)
@pytest.mark.parametrize("length", [1, 3, 4, 9])
@torch.no_grad()
def test_layer_is_section_2(family, act, length):
    layer = tiny.layers(tiny.patched(family, act))[0]
    x = torch.randn(length, 24)
    expected = by_hand(layer, x, layer.plugins["4"])
    torch.testing.assert_close(tiny.run(layer, x[None])[0], expected, atol=1e-5, rtol=1e-5)


MODELS = {variant: tiny.patched(*variant, ratio=3, ratios=(3,)) for variant in tiny.VARIANTS}


@settings(max_examples=50, deadline=None)
@given(
    variant=st.sampled_from(tiny.VARIANTS),
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    padding=st.integers(0, 5),
    left=st.booleans(),
    dtype=st.sampled_from([torch.int64, torch.bool, torch.float32, torch.float16]),
)
@torch.no_grad()
def test_a_row_depends_on_itself_alone(variant, lengths, padding, left, dtype):
    model = MODELS[variant]
    left = left and (variant in tiny.T5_VARIANTS or tiny.takes_positions(model))
    ids, mask = tiny.batch(*lengths, left=left, width=max(lengths) + padding)
    together = tiny.encode(model, ids, mask.to(dtype))
    for row in range(len(lengths)):
        real = mask[row].bool()
        alone = tiny.encode(model, ids[row][real][None])
        torch.testing.assert_close(together[row][real], alone[0], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_mask_by_position_and_through_the_model(variant):
    model = tiny.patched(*variant, head=tiny.bare(variant[0]))
    ids, mask = tiny.batch(9, 4)
    positions = {"position_ids": None} if tiny.takes_positions(model) else {}
    expected = tiny.encode(model, ids, mask, **positions)
    assert not torch.allclose(tiny.encode(model, ids)[1], expected[1], atol=1e-3)
    assert torch.equal(tiny.encoder(model)(ids, mask).last_hidden_state, expected)
    assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, expected)
    ones = torch.ones_like(mask)
    torch.testing.assert_close(tiny.encode(model, ids, ones), tiny.encode(model, ids))


@pytest.mark.parametrize("family", tiny.BERTS)
def test_hidden_states_can_be_returned(family):
    model = tiny.patched(family, "gelu", head="ForTokenClassification")
    ids, mask = tiny.batch(9, 4)
    positions = tiny.positions(model, mask)
    out = model(ids, attention_mask=mask, output_hidden_states=True, **positions)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[-1], tiny.encode(model, ids, mask))


@pytest.mark.parametrize("family", tiny.BERTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_padding_does_not_change_what_a_head_says(family, attention, left):
    settings = {"head": "ForTokenClassification", "attn_implementation": attention}
    if attention == "sdpa" and not tiny.model(family)._supports_sdpa:
        pytest.skip(f"transformers {transformers.__version__} has no SDPA for {family}")
    model = tiny.patched(family, "gelu", **settings)
    if left and not tiny.takes_positions(model):
        pytest.skip(f"transformers {transformers.__version__} lets {family} take no positions")
    ids, mask = tiny.batch(9, 4, left=left, width=11)
    together = model(ids, attention_mask=mask, **tiny.positions(model, mask)).logits
    for row in range(2):
        real = mask[row].bool()
        alone = model(ids[row][real][None]).logits[0]
        torch.testing.assert_close(together[row][real], alone, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_refuses_a_mask_that_does_not_tell_tokens(family):
    model = tiny.patched(family)
    ids, mask = tiny.batch(9, 4)
    additive = torch.where(mask.bool(), 0.0, -1e9)[:, None, None, :].expand(-1, 1, 9, -1)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[batch, length\].*got"):
        tiny.encode(model, ids, additive)
    assert tiny.encoder(model).variator_state.local.context is None


def test_a_block_called_alone_uses_the_models_ratio():
    model = tiny.patched()
    layer = model.encoder.block[0].layer[-1]
    x = torch.randn(2, 8, 24)
    compressed = layer(x)
    with vk.use_ratio(model, 1):
        assert torch.equal(layer(x), x + layer.DenseReluDense(layer.layer_norm(x)))
        assert not torch.equal(layer(x), compressed)


@pytest.mark.parametrize("act", ["relu", "gated-gelu"])
def test_fp16_with_fp32_wo(act):
    model = tiny.model("t5", act).half()
    for block in model.encoder.block:
        block.layer[-1].DenseReluDense.wo.float()
    wide = tiny.patched("t5", act)
    vk.patch_t5(model, ratios=(2, 4), bottleneck=6)
    tiny.train_plugins(model)
    ids, mask = tiny.batch(9, 4)
    with torch.no_grad():
        out, expected = tiny.encode(model, ids, mask), tiny.encode(wide, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(out[real].float(), expected[real], atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    "variant", [("t5", "relu"), ("t5", "gated-gelu"), ("bert", "gelu"), ("distilbert", "gelu")]
)
def test_bf16_autocast_forward_and_backward(variant):
    model = tiny.patched(*variant)
    ids, mask = tiny.batch(9, 4)
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = tiny.encode(model, ids, mask)
        (out.float() * mask[..., None]).square().mean().backward()
        used = [p.grad for k, p in plugin_items(model) if k == "4"]
        assert all(g.dtype == torch.float32 for g in used)
        grads.append(torch.cat([g.flatten() for g in used]))
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[0].norm()


def plugin_items(model):
    for layer in find(model).layers:
        for ratio, plugin in layer.plugins.items():
            for parameter in plugin.parameters():
                yield ratio, parameter


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_check(model, compiler):
    """Runs the compiled encoder and compares it with the eager one."""
    compiled = torch.compile(tiny.encoder(model), fullgraph=True, backend=compiler)
    ids, mask = tiny.batch(9, 4)

    def check(mask=mask):
        with torch.no_grad():
            positions = tiny.positions(model, mask)
            out = compiled(ids, attention_mask=mask, **positions).last_hidden_state
        torch.testing.assert_close(out, tiny.encode(model, ids, mask), atol=1e-5, rtol=1e-4)
        return out

    return check


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_compiles_as_one_graph(variant, fresh_compiler):
    """A second layer is for T5's table of distances, which the first one makes."""
    layers = 2 if variant == tiny.T5_VARIANTS[0] else 1
    compiled_check(tiny.patched(*variant, num_layers=layers), "eager")()


@pytest.mark.slow
def test_compiles_with_inductor(fresh_compiler):
    """One family, whose sublayer is one op to it, at one ratio: another is another graph, whatever
    compiles it (the test below)."""
    compiled_check(tiny.patched("t5", num_layers=1), "inductor")()


@pytest.mark.parametrize("family", ["t5", "distilbert"])
def test_compiled_code_follows_the_ratio(family, fresh_compiler):
    model = tiny.patched(family, num_layers=1)
    check = compiled_check(model, "eager")
    four = check()
    with vk.use_ratio(model, 2):
        two = check()
        with vk.use_ratio(model, 1):
            dense = check()
        assert torch.equal(check(), two)
    assert torch.equal(check(), four)
    check(None)
    vk.set_ratio(model, 2)
    assert torch.equal(check(), two)
    assert not torch.allclose(two, four, atol=1e-3)
    assert not torch.allclose(two, dense, atol=1e-3)


@pytest.mark.parametrize("family", ["t5", "bert", "distilbert"])
def test_compiles_in_training_and_with_replaced_linears(family, fresh_compiler):
    model = tiny.patched(family).train()
    layer, path = tiny.layers(model)[0], find(model).family.w_in[0]
    container, name = follow(layer, path.rpartition(".")[0]), path.rpartition(".")[2]
    setattr(container, name, type("Other", (torch.nn.Linear,), {})(24, 40, bias=False))
    assert describe(layer).module is not None
    compiled = torch.compile(tiny.encoder(model), fullgraph=True, backend="aot_eager")
    ids, mask = tiny.batch(9, 4)
    grads = []
    for encoder in (compiled, tiny.encoder(model)):
        model.zero_grad()
        out = encoder(ids, attention_mask=mask).last_hidden_state
        out.square().mean().backward()
        grads.append([p.grad for k, p in plugin_items(model) if k == "4"])
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
