"""Forwards over sequences without padding: by cu_seq_lens_q, or taken out by the encoder itself."""

import pytest
import torch
import torch.nn.functional as F
import transformers

import variator_kernels as vk
from tests.sites import tiny, zoo
from tests.sites.attention_cases import patched, placed, sublayer
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LENGTHS = (9, 4, 1, 6)
OFFSETS = torch.tensor([0, 9, 13, 14, 20])
NAMES = ["bert", "roberta", "modernbert", "nomic_bert", "gte", "eurobert"]


def by_sequence(module, query, key, value, mask, scaling=None, dropout=0.0, **given):
    """What flash attention makes of packed sequences, in PyTorch."""
    window = given.get("sliding_window")
    offsets = given["cu_seq_lens_q"]
    sequence = torch.bucketize(torch.arange(query.shape[2]), offsets, right=True)
    place = torch.arange(query.shape[2])
    seen = sequence[:, None] == sequence
    if window is not None:
        seen &= (place[:, None] - place).abs() < window
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return out.transpose(1, 2), None


@pytest.fixture
def packs():
    """An implementation of attention that knows packed sequences; transformers 5 takes such."""
    utils = pytest.importorskip("transformers.modeling_utils")
    masks = pytest.importorskip("transformers.masking_utils")
    if transformers.__version__ < "5":
        pytest.skip("this version of transformers hands no packed sequences on")
    utils.AttentionInterface.register("by_sequence", by_sequence)
    masks.AttentionMaskInterface.register("by_sequence", lambda *_, **__: None)
    return "by_sequence"


def packed(ids, mask):
    real = mask.bool()
    return {
        "input_ids": ids[real][None],
        "position_ids": (mask.cumsum(-1) - 1)[real][None],
        "cu_seq_lens_q": OFFSETS,
    }


@pytest.mark.parametrize("placements", [("ffn",), ("attention_kv",), ("ffn", "attention")])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_packed_sequences_are_the_padded_batch(name, placements, packs):
    model = patched(name, *placements, keep_first=1, keep=[7])
    ids, mask = tiny.batch(*LENGTHS)
    given = packed(ids, mask)
    if name == "roberta":
        given["position_ids"] = given["position_ids"] + 1  # behind its padding's, 0
    encoder = find(model).encoder
    for level in (1, 3):
        with vk.use_ratio(model, level):
            model.set_attn_implementation("eager")
            expected = encoder(ids, attention_mask=mask).last_hidden_state[mask > 0]
            model.set_attn_implementation(packs)
            got = encoder(**given).last_hidden_state[0]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    with vk.use_ratio(model, 3), vk.keep(model, torch.ones_like(given["input_ids"])):
        whole = encoder(**given).last_hidden_state
    with vk.use_ratio(model, 1):
        torch.testing.assert_close(whole, encoder(**given).last_hidden_state, atol=2e-5, rtol=1e-4)


def test_gradients_and_checkpointing(packs):
    found = []
    for checkpointed in (False, True):
        model = patched("modernbert", "ffn", "attention_kv", keep_first=1).train()
        model.set_attn_implementation(packs)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids, mask = tiny.batch(*LENGTHS)
        model(**packed(ids, mask)).last_hidden_state.square().sum().backward()
        found.append([p.grad for p in vk.plugin_parameters(model, [3])])
        assert all(grad is not None and grad.any() for grad in found[-1])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seq_lens_q": [0, 20]}, "must be integers"),
        ({"cu_seq_lens_q": OFFSETS.float()}, "must be integers"),
        ({"cu_seq_lens_q": OFFSETS[:-1]}, "must rise from 0"),
        ({"cu_seq_lens_q": OFFSETS.flip(0)}, "must rise from 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 15, 9, 20])}, "must rise from 0"),
        (
            {"attention_mask": torch.ones(1, 20).long()},
            "attention_mask must be None with cu_seq_lens_q",
        ),
    ],
)
def test_refusals(change, message, packs):
    model = patched("bert", "ffn", attention=packs)
    given = packed(*tiny.batch(*LENGTHS)) | change
    with pytest.raises(ValueError, match=message):
        model(**given)


@placed
@torch.no_grad()
def test_an_encoder_that_takes_its_padding_out(placement):
    """As ModernBERT does in transformers 4.57 with flash attention: ``[T, d]`` and the mask."""
    model = patched("bert", "ffn", placement, keep_first=1)
    x = torch.randn(3, 7, zoo.D)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, :2] = mask[1, 4:] = mask[2, 3] = False
    found = find(model)
    state, block = found.encoder.variator_state, found.layers[0]
    expected = sublayer(model, x, mask)[mask]
    state.local.context = state.context(state.check(3), mask)
    try:
        attended = found.attentions[0](x[mask])[0]
        fed, whole = block.feed_forward_chunk(x[mask]), block.feed_forward_chunk(x)[mask]
        with pytest.raises(ValueError, match=r"or the tokens \[tokens, hidden\]"):
            block.feed_forward_chunk(x[mask][1:])
    finally:
        state.local.context = None
    torch.testing.assert_close(attended, expected)
    torch.testing.assert_close(fed, whole)
