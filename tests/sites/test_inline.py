"""Blocks that call the parts of their FFN themselves, and encoders that pad."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartEncoderLayer

import variator_kernels as vk
from tests.sites import tiny, zoo
from tests.sites.test_table import encode, patched
from variator_kernels.runtime.state import observe
from variator_kernels.sites.families import FAMILIES
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
INLINE = [name for name in zoo.NAMES if zoo.family(name).called]
SOME = ["bart", "mbart", "mpnet", "deberta"]


@pytest.mark.parametrize(
    "name", [n for n in (*SOME, "modernbert", "gte", "albert", "esm") if n in zoo.NAMES]
)
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    model = patched(name, sizes=zoo.one_layer(name))
    ids, mask = tiny.batch(9, 4)
    encoder = find(model).encoder
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    for ratio in (3, 1):
        with torch.no_grad(), vk.use_ratio(model, ratio):
            out = compiled(ids, attention_mask=mask).last_hidden_state
            expected = encoder(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", SOME)
def test_copies_and_pickles(name):
    model = patched(name)
    ids, mask = tiny.batch(9, 4)
    expected = encode(model, ids, mask)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(encode(twin, ids, mask), expected)


@pytest.mark.parametrize("name", INLINE)
def test_each_block_restored_after_an_error(name):
    """An observer that raises in the middle of a block leaves nothing switched."""
    model = patched(name)
    ids, mask = tiny.batch(9, 4)
    expected, state = encode(model, ids, mask), find(model).encoder.variator_state
    for ratio in (1, 3):
        handle = find(model).layers[1].variator_state.local

        def fail(*_):
            raise KeyboardInterrupt

        handle.observer = fail
        with vk.use_ratio(model, ratio), pytest.raises(KeyboardInterrupt):
            encode(model, ids, mask)
        handle.observer = None
        assert state.local.inline == 0 and state.local.context is None
    assert torch.equal(encode(model, ids, mask), expected)


def test_dropout_is_where_the_specification_has_it(monkeypatch):
    """On the groups' FFN output, once: not on the tokens behind it."""
    model = zoo.plain("bart", dropout=0.0, activation_dropout=0.0)
    vk.patch(model, 3, (3,), 6)
    tiny.train_plugins(model)
    block = find(model).blocks[0]
    block.dropout, block.activation_dropout = 0.25, 0.125
    assert (block.dropout, vars(block)["dropout"]) == (0.25, 0.25)
    described = block.feed_forward()
    assert (described.dropout_outer, described.dropout_inner) == (0.0, 0.0)
    block.train()
    described = block.feed_forward()
    assert (described.dropout_outer, described.dropout_inner) == (0.25, 0.125)
    seen, real = [], nn.functional.dropout

    def dropout(x, p=0.5, training=True, inplace=False):
        seen.append((x.shape[-2:], p if training else 0.0))
        return real(x, 0.0, training)

    monkeypatch.setattr(nn.functional, "dropout", dropout)
    hidden = torch.randn(2, 9, 24)
    arguments = zoo.arguments(block)
    if (
        "layer_head_mask" in inspect.signature(BartEncoderLayer.forward).parameters
    ):  # before version 5
        arguments["layer_head_mask"] = None
    block(hidden, None, **arguments)
    wide = [(shape[0], p) for shape, p in seen if p > 0]
    # The attention's on 9 tokens; the FFN's two on groups; none on tokens behind them.
    assert [p for n, p in wide if n == 9 and p == 0.25] == [0.25]
    assert sorted(p for n, p in wide if n != 9) == [0.125, 0.25]
    seen.clear()
    with vk.use_ratio(model, 1):
        block(hidden, None, **arguments)
    assert sorted(p for _, p in [(n, p) for n, p in seen if p > 0]) == [0.125, 0.25, 0.25]


def test_parts_can_be_replaced_after_patching():
    model = patched("bart")
    ids, mask = tiny.batch(9, 4)
    block = find(model).blocks[0]
    before, new = encode(model, ids, mask), nn.Linear(24, 40)
    block.fc1 = new
    assert block.fc1 is new and block._modules["fc1"] is new
    assert not torch.allclose(encode(model, ids, mask), before, atol=1e-4)
    with pytest.raises(TypeError, match="fc1"):
        block.fc1 = "linear"
    with vk.use_ratio(model, 1):
        dense = encode(model, ids, mask)
    vk.unpatch(model)
    assert torch.equal(encode(model, ids, mask), dense)


@pytest.mark.parametrize("name", ["longformer", "led", "big_bird", "bigbird_pegasus"])
def test_padding_that_the_encoder_appends_is_in_no_group(name):
    sizes = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
    own = sizes if "bird" in name else {}
    model = vk.patch(zoo.plain(name, **own), 2, (2, 4), 6)
    tiny.train_plugins(model)
    assert FAMILIES[name].pads
    length = 33 if own else 9
    ids = torch.randint(2, 40, (2, length))
    mask = torch.ones_like(ids)
    masked = encode(model, ids, mask)
    torch.testing.assert_close(encode(model, ids), masked, atol=1e-5, rtol=1e-4)
    with vk.keep(model, mask * (torch.arange(length) == 2)):
        assert not torch.equal(encode(model, ids), masked)
    if not own:  # whose random blocks depend on the padded length
        wider = torch.cat([ids, ids.new_zeros(2, 2)], 1)
        out = encode(model, wider, torch.cat([mask, mask.new_zeros(2, 2)], 1))
        torch.testing.assert_close(out[:, :length], masked, atol=1e-5, rtol=1e-4)
    seen = []
    state = find(model).encoder.variator_state
    with observe(state, lambda layer, x, m, k: seen.append((x.shape[1], m.sum(1).tolist()))):
        encode(model, ids)
    assert seen[0][0] > length and seen[0][1] == [length, length]


def test_unpadded_hidden_states_are_refused():
    """As flash attention has them in transformers 4.57."""
    model = patched("modernbert")
    layer = find(model).layers[0]
    with pytest.raises(ValueError, match=r"must be \[batch, length, hidden\].*got \[7, 24\]"):
        layer(torch.randn(7, 24))
    with vk.use_ratio(model, 1):
        assert layer(torch.randn(7, 24)).shape == (7, 24)


def test_byt5_and_flan_are_t5s():
    sizes = {"d_model": 24, "d_kv": 4, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    from transformers import MT5Config, T5Config, T5EncoderModel

    byt5 = T5Config(vocab_size=384, feed_forward_proj="gated-gelu", **sizes)
    flan = T5Config(
        vocab_size=40, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **sizes
    )
    ids, mask = tiny.batch(9, 4)
    for config in (byt5, flan, MT5Config(vocab_size=40, **sizes)):
        model = vk.patch(T5EncoderModel._from_config(config).eval(), 4)
        assert model(ids, attention_mask=mask).last_hidden_state.isfinite().all()
