"""What patch and its like refuse, and that nothing has changed then."""

from functools import partial

import pytest
from torch import nn

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.sites.families import REFUSED
from variator_kernels.sites.family import follow


def other_class(model):
    model.encoder.block[1].layer[-1].__class__ = type(
        "Mine", (type(model.encoder.block[1].layer[-1]),), {}
    )


def bound_forward(model):
    layer = model.encoder.block[1].layer[-1]
    layer.forward = lambda x: x


def bound_encoder_forward(model):
    model.encoder.forward = partial(model.encoder.forward)


def other_norm(model):
    model.encoder.block[0].layer[-1].layer_norm = nn.LayerNorm(24)


def no_norm(model):
    del model.encoder.block[1].layer[-1].layer_norm


def no_sublayers(model):
    model.encoder.block[1].layer = nn.ModuleList()


def other_block(model):
    model.encoder.block[1] = nn.Identity()


def no_blocks(model):
    model.encoder.block = nn.ModuleList()


def bert_output(model):
    tiny.layers(model)[1].output = nn.Identity()


def bert_other_norm(model):
    tiny.layers(model)[0].output.LayerNorm = nn.RMSNorm(24)


def bert_chunk(model):
    tiny.layers(model)[1].forward = partial(tiny.layers(model)[1].forward)


def chunked(model):
    tiny.layers(model)[1].chunk_size_feed_forward = 2


def distilbert_no_dropout(model):
    del tiny.layers(model)[1].dropout


BERT_CHANGES = [
    ("bert", bert_output, "FFN sublayer 1 has no 'output.dense'"),
    ("electra", bert_other_norm, "plain LayerNorm, got torch.*RMSNorm"),
    ("roberta", bert_chunk, "forward of RobertaLayer was replaced"),
    ("distilbert", bert_chunk, "forward of FFN was replaced"),
    ("distilbert", distilbert_no_dropout, "FFN sublayer 1 has no 'dropout'"),
    ("bert", chunked, "chunk_size_feed_forward must be 0, got 2"),
    ("distilbert", chunked, "chunk_size_feed_forward must be 0, got 2"),
]


@pytest.mark.parametrize(("family", "change", "message"), BERT_CHANGES)
def test_refuses_a_changed_bert(family, change, message):
    model = tiny.model(family, "gelu")
    change(model)
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        vk.patch_bert(model)
    assert tiny.snapshot(model) == before


def test_refuses_chunks_that_come_later():
    model = tiny.patched("bert", "gelu")
    chunked(model)
    ids, mask = tiny.batch(8, 8)
    with pytest.raises(ValueError, match="chunk_size_feed_forward must be 0, got 2"):
        tiny.encode(model, ids)
    with vk.use_ratio(model, 1):
        tiny.encode(model, ids, mask)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_refuses_a_bert_that_is_a_decoder(family):
    model = tiny.model(family, "gelu", is_decoder=True)
    before = tiny.snapshot(model)
    for patch in (vk.patch, vk.patch_bert):
        with pytest.raises(ValueError, match=r"got 0 in a .*Model, and 1 with config.is_decoder"):
            patch(model)
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize(("hooked", "replaced"), [("output", False), ("output.dropout", True)])
def test_refuses_to_pass_by_what_others_put_in(hooked, replaced):
    model = tiny.patched("bert", "gelu")
    part = follow(tiny.layers(model)[1], hooked)
    if replaced:
        part.forward = lambda x: 2 * x
    else:
        part.register_forward_hook(lambda module, args, out: 2 * out)
    ids, mask = tiny.batch(9)
    with pytest.raises(TypeError, match=f"{hooked} of BertLayer was replaced or hooked"):
        tiny.encode(model, ids, mask)


CHANGES = [
    (other_class, "plain T5LayerFF, got .*Mine"),
    (bound_forward, "forward of T5LayerFF was replaced"),
    (bound_encoder_forward, "forward of T5Stack was replaced"),
    (other_norm, "plain T5LayerNorm, got torch.*LayerNorm"),
    (no_norm, "FFN sublayer 1 has no 'layer_norm'"),
    (no_sublayers, "lacks the expected sublayers"),
    (other_block, r"block 1 must have a T5Block .*got torch.*Identity"),
    (no_blocks, "has no blocks"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_refuses_a_changed_model(change, message):
    model = tiny.model()
    change(model)
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        vk.patch_t5(model)
    assert tiny.snapshot(model) == before


def test_refuses_a_class_forward_that_is_not_the_familys(monkeypatch):
    model = tiny.model()
    kind = type(model.encoder.block[0].layer[-1])
    monkeypatch.setattr(kind, "forward", lambda self, x: x)
    with pytest.raises(ValueError, match="forward of T5LayerFF was replaced"):
        vk.patch_t5(model)


ARGUMENTS = [
    ({"ratio": 0}, "ratio must be >= 1, got 0"),
    ({"ratio": True}, "ratio must be an integer >= 1, got True"),
    ({"ratio": 2.5}, "ratio must be an integer >= 1, got 2.5"),
    ({"ratio": float("nan")}, "ratio must be an integer >= 1, got nan"),
    ({"ratio": float("inf")}, "ratio must be an integer >= 1, got inf"),
    ({"ratio": "4"}, "ratio must be an integer >= 1, got '4'"),
    ({"ratios": (1, 2)}, "ratios must be >= 2, got 1"),
    ({"ratios": 4}, "ratios must be a sequence of integers >= 2, got 4"),
    ({"ratio": 1, "ratios": ()}, "ratios must name at least one"),
    ({"bottleneck": 0}, "bottleneck must be >= 1, got 0"),
    ({"bottleneck": 1.5}, "bottleneck must be an integer"),
    ({"activation": "relu"}, r"activation must be one of \('tanh', 'identity'\), got 'relu'"),
    ({"placements": ("keys",)}, r"placements must be among \('ffn', .*got 'keys'"),
    ({"placements": ("attention", "attention_kv")}, "must not hold both"),
    ({"placements": ()}, "placements must name at least one"),
    ({"placements": ("ffn", "attention"), "ratio": {"attention_kv": 2}}, "placements must hold"),
    ({"ratios": {"ffn": (2,), "attention_kv": ()}}, "at least one ratio >= 2 for 'attention_kv'"),
    ({"ratios": {"head": (2,)}}, "placements must be among"),
    ({"backend": "tpu"}, "backend must be one of"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_refuses_bad_arguments(arguments, message):
    model = tiny.model()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        vk.patch_t5(model, **arguments)
    assert tiny.snapshot(model) == before


def test_a_failure_half_way_leaves_nothing(monkeypatch):
    model = tiny.model()
    before = tiny.snapshot(model)
    made = []

    def fail_at_the_last(*args, **settings):
        made.append(vk.Plugin(*args, **settings))
        if len(made) == 6:
            raise MemoryError
        return made[-1]

    monkeypatch.setattr("variator_kernels.methods.variator.method.Plugin", fail_at_the_last)
    with pytest.raises(MemoryError):
        vk.patch_t5(model)
    assert tiny.snapshot(model) == before


def test_refuses_other_models():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        vk.patch_t5("t5-base")
    with pytest.raises(
        ValueError, match=r"exactly one encoder of a known family.*got 0 in a Linear"
    ):
        vk.patch_t5(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"exactly one encoder.*got 0 in a T5Stack"):
        vk.patch_t5(tiny.model().decoder)
    with pytest.raises(
        ValueError,
        match=r"got 0 in a BertModel.*'bert': vk.patch\(model\) supports.*: t5, mt5, umt5, longt5$",
    ):
        vk.patch_t5(tiny.model("bert", "gelu"))
    with pytest.raises(ValueError, match=r"got 0 in a T5EncoderModel.*Known here: bert, "):
        vk.patch_bert(tiny.model(head="EncoderModel"))
    other = nn.Linear(2, 2)
    other.config = type("Config", (), {"model_type": "mine"})()
    with pytest.raises(
        ValueError,
        match=r"got 0 in a Linear of model_type 'mine': describe.*here: t5, mt5, .*, electra, ",
    ):
        vk.patch(other)
    for kind, why in REFUSED.items():
        other.config.model_type = kind
        with pytest.raises(ValueError, match=f"'{kind}', which cannot be patched: {why[:30]}"):
            vk.patch(other)
    with pytest.raises(ValueError, match=r"known family, got 0 in a Linear. Known here: t5, "):
        vk.patch(nn.Linear(2, 2))


def test_refuses_twice_and_never():
    model = tiny.model()
    for function in (vk.unpatch, vk.plugin_parameters, lambda m: vk.set_ratio(m, 2)):
        with pytest.raises(ValueError, match="model is not patched"):
            function(model)
    vk.patch_t5(model)
    before = tiny.snapshot(model)
    for function in (vk.patch, vk.patch_t5):
        with pytest.raises(ValueError, match="already patched"):
            function(model)
    assert tiny.snapshot(model) == before
