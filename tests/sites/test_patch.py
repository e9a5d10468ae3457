"""patch, unpatch, plugin_parameters: what they change."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import EncoderDecoderConfig, EncoderDecoderModel

import variator_kernels as vk
from tests.sites import tiny

HEADS = ["Model", "EncoderModel", "ForConditionalGeneration", "ForTokenClassification"]


@pytest.mark.parametrize(("family", "act"), tiny.VARIANTS)
def test_dense_and_unpatched_are_bit_exact(family, act):
    model = tiny.model(family, act)
    ids, mask = tiny.batch(9, 4)
    expected = tiny.encode(model, ids, mask)
    before = tiny.snapshot(model)
    assert vk.patch(model, ratio=4) is model
    tiny.train_plugins(model)
    assert not torch.equal(tiny.encode(model, ids, mask), expected)
    vk.set_ratio(model, 1)
    assert torch.equal(tiny.encode(model, ids, mask), expected)
    assert vk.unpatch(model) is model
    assert torch.equal(tiny.encode(model, ids, mask), expected)
    assert tiny.snapshot(model) == before
    vk.patch(model)


def test_refuses_to_unpatch_under_another_tool():
    model = vk.patch(tiny.model("bert", "gelu"))
    model.forward = partial(model.forward)
    state = model.variator_state
    with pytest.raises(ValueError, match="forward of BertModel was replaced after patching"):
        vk.unpatch(model)
    assert all(layer.variator_state is state for layer in tiny.layers(model))
    del model.forward
    vk.unpatch(model)


@pytest.mark.parametrize("head", [*HEADS, "ForSequenceClassification", "ForQuestionAnswering"])
def test_patches_the_encoder_of_every_head(head):
    model = tiny.model(head=head)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    vk.patch_t5(model, ratios=(2,))
    keys = set(model.state_dict()) - set(base)
    assert len(keys) == 2 * 6
    assert not any("decoder" in key for key in keys)
    assert all(
        torch.equal(value, base[key]) for key, value in model.state_dict().items() if key in base
    )


BERT_HEADS = [
    "Model",
    "ForSequenceClassification",
    "ForMaskedLM",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
]


@pytest.mark.parametrize("family", tiny.BERTS)
@pytest.mark.parametrize("head", BERT_HEADS)
def test_patches_every_head_of_bert(family, head):
    model = tiny.model(family, "gelu", head=head)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    ids, mask = tiny.batch(9, 4)
    ids, mask = (ids[:, None], mask[:, None]) if head == "ForMultipleChoice" else (ids, mask)
    expected = model(ids, attention_mask=mask)[0]
    vk.patch_bert(model, ratio=2, ratios=(2,))
    tiny.train_plugins(model)
    assert len(set(model.state_dict()) - set(base)) == 2 * 6
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    assert not torch.allclose(model(ids, attention_mask=mask)[0], expected, atol=1e-4)
    with vk.use_ratio(model, 1):
        assert torch.equal(model(ids, attention_mask=mask)[0], expected)
    vk.unpatch(model)
    assert torch.equal(model(ids, attention_mask=mask)[0], expected)


def test_patches_a_bare_encoder_and_a_wrapped_model():
    model = tiny.model(head="EncoderModel")
    vk.patch_t5(model.encoder)
    assert len(vk.plugin_parameters(model)) == 2 * 3 * 6
    wrapped = nn.Sequential(tiny.model())
    vk.patch_t5(wrapped)
    assert len(vk.plugin_parameters(wrapped)) == 2 * 3 * 6


def test_every_argument_reaches_the_plugins():
    model = vk.patch_t5(tiny.model(), 3, [2, 8, 2], 5, "identity", ["ffn"], "reference")
    plugins = model.encoder.block[0].layer[-1].plugins
    assert list(plugins) == ["2", "3", "8"]
    assert plugins["8"].merge.weight.shape == (8, 8 * 24)
    assert plugins["8"].adapter.w1.shape == (5, 48)
    assert plugins["8"].adapter.activation == "identity"
    state = model.encoder.variator_state
    assert (state.ratio, state.method.config.backend) == (3, "reference")
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("ratios", "active"),
    [((2, 4, 8), 4), ((16, 2), 16), ((8, 4), 4), pytest.param(iter([2]), 2, id="iterator")],
)
def test_the_active_ratio_is_one_of_those_asked_for(ratios, active):
    state = vk.patch(tiny.model(), ratios=ratios).encoder.variator_state
    assert state.ratio == active and set(state.ratios) <= {2, 4, 8, 16}
    assert active in state.ratios and (4 in state.ratios) == (active == 4)
    with pytest.raises(ValueError, match="ratios must name at least one"):
        vk.patch(tiny.model(), ratios=())


def test_refuses_what_is_no_model():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        vk.patch("folder")


def test_requires_grad_of_the_base_is_left_alone():
    model = tiny.model().requires_grad_(False)
    model.shared.weight.requires_grad_(True)
    vk.patch_t5(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {
        id(p) for p in [model.shared.weight, *vk.plugin_parameters(model)]
    }


@pytest.mark.parametrize("family", tiny.BERTS)
def test_plugins_take_the_dtype_of_a_bert(family):
    model = vk.patch_bert(tiny.model(family, "gelu").to(torch.bfloat16))
    tiny.train_plugins(model)
    assert {p.dtype for p in vk.plugin_parameters(model)} == {torch.bfloat16}
    ids, mask = tiny.batch(9, 4)
    assert tiny.encode(model, ids, mask).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_plugins_take_dtype_and_device_of_the_ffn(dtype):
    model = tiny.model().to(dtype)
    for block in model.encoder.block:
        block.layer[-1].DenseReluDense.wo.float()
    vk.patch_t5(model)
    assert {p.dtype for p in vk.plugin_parameters(model)} == {dtype}
    with torch.device("meta"):
        meta = vk.patch_t5(tiny_meta())
    assert {p.device.type for p in vk.plugin_parameters(meta)} == {"meta"}


def tiny_meta():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**tiny.SIZES))


def test_untrained_plugins_copy_the_output_of_the_mean():
    model = vk.patch_t5(tiny.model(), ratio=4)
    layer = model.encoder.block[0].layer[-1]
    x = torch.randn(1, 4, 24)
    h = layer.layer_norm(x)
    expected = x + layer.DenseReluDense(h.mean(1, keepdim=True))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_the_encoder_of_an_encoder_decoder_of_berts():
    encoder = tiny.config("bert", "gelu")
    decoder = tiny.config("bert", "gelu", is_decoder=True, add_cross_attention=True)
    both = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = vk.patch_bert(EncoderDecoderModel(both).eval())
    assert all(".plugins." not in key for key in model.decoder.state_dict())
    assert len(vk.plugin_parameters(model.encoder)) == 2 * 3 * 6


def test_decoder_stays_dense_and_generate_works():
    model = tiny.model()
    ids, mask = tiny.batch(9, 5)
    encoder_out = tiny.encode(model, ids, mask)
    decoded = model(encoder_outputs=(encoder_out,), attention_mask=mask, decoder_input_ids=ids)
    vk.patch_t5(model)
    tiny.train_plugins(model)
    again = model(encoder_outputs=(encoder_out,), attention_mask=mask, decoder_input_ids=ids)
    assert torch.equal(again.logits, decoded.logits)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=2)
    alone = model.generate(ids[1:, :5], max_new_tokens=5, num_beams=2)
    assert tokens.shape[0] == 2
    assert torch.equal(tokens[1, : alone.shape[1]], alone[0])


@pytest.mark.parametrize(("family", "parts"), [("t5", 2), ("bert", 1), ("distilbert", 2)])
def test_is_still_its_class(family, parts):
    model = tiny.model(family, head=tiny.bare(family))
    kinds = [type(m) for m in model.modules()]
    vk.patch(model)
    patched = [m for m in model.modules() if "variator_state" in vars(m)]
    assert len(patched) == 1 + 2 * parts
    for module in patched:
        assert any(isinstance(module, kind) for kind in kinds)
        assert type(module).__name__ in {kind.__name__ for kind in kinds}
    assert copy.deepcopy(model) is not model
