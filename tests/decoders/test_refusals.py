"""What a decoder cannot bear is refused, at patching or when it is asked for; files."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

import variator_kernels as vk
from tests.decoders import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_as_a_whole(family):
    model = tiny.model(family)
    with pytest.raises(ValueError, match="placements must not hold 'attention'"):
        vk.patch(model, placements=("attention",))
    assert not any("variator" in name for m in model.modules() for name in vars(m))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mistral", {"sliding_window": 8}, "sliding attention"),
        ("gemma2", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_attention_kv(family, settings, message):
    model = tiny.model(family, **settings)
    tokens = tiny.ids()
    wanted = model(tokens).logits
    with pytest.raises(ValueError, match=message):
        vk.patch(model, {"attention_kv": 2})
    assert torch.equal(model(tokens).logits, wanted)
    vk.patch(model, {"ffn": 2})
    model(tokens)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2", "qwen3"])
@torch.no_grad()
def test_sliding_layers_stay_dense(family, tmp_path):
    """There is no site at them; the others merge."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    extra = {"layer_types": kinds, "sliding_window": 7, "num_hidden_layers": 4}
    if family.startswith("qwen"):
        extra["use_sliding_window"] = True
    patched = tiny.patched(family, window=5, keep_first=2, **extra)
    assert "attention_kv" in vk.describe(patched)
    sites = patched.model.variator_state.sites
    assert [site.layer for site in sites] == [1, 3]
    tokens = tiny.ids(2, 29)
    whole = patched(tokens, use_cache=False).logits
    cache = DynamicCache(config=patched.config)
    got, _ = tiny.in_pieces(patched, tokens, [11, 12, 13, 29], cache)
    # Gemma 2's own attention has its softmax in fp32.
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-6)
    vk.save_plugins(patched, tmp_path)
    other = tiny.model(family, **extra)
    vk.load_plugins(other, tmp_path)
    assert torch.equal(other(tokens).logits, patched(tokens).logits)
    with vk.use_ratio(patched, {"attention_kv": {3: 3}}):
        patched(tokens)
    with pytest.raises(ValueError, match=r"must name layers among \[1, 3\], got 0"):
        vk.set_ratio(patched, {"attention_kv": {0: 3}})
    with pytest.raises(ValueError, match=r"must name layers among \[1, 3\], got -1"):
        vk.set_ratio(patched, {"attention_kv": {-1: 3}})


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_files(family, tmp_path):
    ratio = {"ffn": {-1: 4}, "attention_kv": 3}
    patched = tiny.patched(family, ratio, window=5, keep_first=2, keep_last=1)
    tokens = tiny.ids()
    wanted = patched(tokens).logits
    vk.save_plugins(patched, tmp_path / "plugins")
    other = tiny.model(family)
    vk.load_plugins(other, tmp_path / "plugins")
    assert torch.equal(other(tokens).logits, wanted)
    assert "window 5" in vk.describe(other)
    for again in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert torch.equal(again(tokens).logits, wanted)
    other = tiny.model(family)
    vk.patch(other, ratio, window=7)
    with pytest.raises(ValueError, match="window=5"):
        vk.load_plugins(other, tmp_path / "plugins")


@torch.no_grad()
def test_saved_whole(tmp_path):
    patched = tiny.patched(ratio={"ffn": 4, "attention_kv": 3}, window=5, keep_first=2)
    tokens = tiny.ids()
    wanted = patched(tokens).logits
    patched.save_pretrained(tmp_path)
    plain = type(patched).from_pretrained(tmp_path, dtype=torch.float64)
    with vk.use_ratio(patched, 1):
        assert torch.equal(plain(tokens).logits, patched(tokens).logits)
    vk.load_plugins(plain, tmp_path)
    assert torch.equal(plain(tokens).logits, wanted)


@pytest.mark.parametrize("window", [-1, 1.5, True, "64"])
def test_window(window):
    with pytest.raises((ValueError, TypeError), match="window"):
        vk.patch(tiny.model(), window=window)


@torch.no_grad()
def test_arguments_that_do_not_fit():
    patched = tiny.patched(ratio={"ffn": 4, "attention_kv": 3})
    tokens = tiny.ids()
    with pytest.raises(ValueError, match="output_attentions"):
        patched(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        patched(tokens, attention_mask=torch.ones(2, 1, 29, 29))
    cache = DynamicCache()
    patched(tokens[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        patched(tokens[:, :2], past_key_values=cache, attention_mask=torch.ones(2, 1))


def test_patch_llama():
    assert vk.patch_llama(tiny.model(), {"attention_kv": 4}, window=9)
    with pytest.raises(ValueError, match="exactly one encoder of a known family"):
        vk.patch_bert(tiny.model())


@torch.no_grad()
def test_hidden_states_and_other_heads():
    import transformers

    torch.manual_seed(0)
    made = transformers.LlamaForSequenceClassification(tiny.config()).eval().double()
    vk.patch(made, {"ffn": 4, "attention_kv": 3}, window=5)
    tokens, mask, positions = tiny.padded([29, 17], "left")
    got = made(tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    assert len(got.hidden_states) == tiny.LAYERS + 1
    alone = made(tokens[1:, 12:], output_hidden_states=True)
    torch.testing.assert_close(got.logits[1], alone.logits[0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_lora():
    peft = pytest.importorskip("peft")
    patched = tiny.patched(ratio={"ffn": 4, "attention_kv": 3}, window=5, keep_first=2)
    tokens = tiny.ids()
    wanted = patched(tokens, use_cache=False).logits
    adapted = peft.get_peft_model(
        patched, peft.LoraConfig(target_modules=["q_proj", "k_proj", "o_proj", "up_proj"], r=2)
    ).double()
    torch.testing.assert_close(
        adapted(tokens, use_cache=False).logits, wanted, rtol=1e-9, atol=1e-9
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.1)
    moved = adapted(tokens, use_cache=False).logits
    assert (moved - wanted).abs().max() > 1e-3
    got, _ = tiny.in_pieces(adapted.base_model.model, tokens[:, :1], [1])
    vk.set_ratio(patched, {"attention_kv": 3})
    moved = adapted(tokens, use_cache=False).logits
    got, _ = tiny.in_pieces(adapted, tokens, [11, 12, 29])
    torch.testing.assert_close(got, moved, rtol=1e-9, atol=1e-9)
