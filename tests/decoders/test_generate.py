"""``generate()`` of models with merged keys."""

import pytest
import torch
from transformers import DynamicCache, TextStreamer  # noqa: F401

import variator_kernels as vk
from tests.decoders import tiny

LENGTH = 18


def model(**settings):
    return tiny.patched(ratio={"attention_kv": 3}, window=5, keep_first=2, **settings)


def by_hand(patched, tokens, steps, mask=None):
    """Greedy, every prompt whole and without a cache."""
    mask = torch.ones_like(tokens) if mask is None else mask
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = patched(
            tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return tokens


def generate(patched, tokens, steps=LENGTH, **settings):
    given = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
    given.setdefault("attention_mask", torch.ones_like(tokens))
    return patched.generate(tokens, max_new_tokens=steps, **given)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_greedy(family):
    patched = tiny.patched(family, window=5, keep_first=2)
    tokens = tiny.ids(2, 20)
    assert torch.equal(generate(patched, tokens), by_hand(patched, tokens, LENGTH))


@torch.no_grad()
def test_unequal_prompts():
    patched = model()
    tokens, mask, _ = tiny.padded([20, 11, 2], "left")
    got = generate(patched, tokens, attention_mask=mask)
    assert torch.equal(got, by_hand(patched, tokens, LENGTH, mask))
    for row, length in enumerate([20, 11, 2]):
        alone = generate(patched, tokens[row : row + 1, 20 - length :])
        assert torch.equal(alone[0], got[row, 20 - length :])


@torch.no_grad()
def test_chunks():
    patched = model()
    tokens = tiny.ids(2, 20)
    assert torch.equal(
        generate(patched, tokens, prefill_chunk_size=7), by_hand(patched, tokens, LENGTH)
    )


@torch.no_grad()
def test_beams_and_samples_do_not_depend_on_the_cache():
    patched = model()
    tokens = tiny.ids(2, 20)
    for settings in (
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(generate(patched, tokens, use_cache=use_cache, **settings))
        assert torch.equal(*found)


@torch.no_grad()
def test_several_turns_on_one_cache():
    patched = model()
    tokens, cache = tiny.ids(1, 12), DynamicCache()
    for turn in range(3):
        got = generate(patched, tokens, 7, past_key_values=cache)
        assert torch.equal(got, by_hand(patched, tokens, 7))
        tokens = torch.cat((got, tiny.ids(1, 5, seed=turn + 1)), 1)


@torch.no_grad()
def test_assisted():
    """The candidates of another model, or of the prompt, are checked and taken back."""
    patched = model()
    tokens = tiny.ids(1, 20)
    wanted = by_hand(patched, tokens, LENGTH)
    never = {"eos_token_id": tiny.VOCABULARY}  # older versions of transformers want one
    assistant = tiny.model(seed=1)
    assert torch.equal(generate(patched, tokens, assistant_model=assistant, **never), wanted)
    got = generate(patched, tokens, prompt_lookup_num_tokens=4, **never)
    assert torch.equal(got[:, : wanted.shape[1]], wanted)  # older versions go a token too far
    helper = model(seed=0)  # the same model: all its candidates are right
    assert torch.equal(generate(patched, tokens, assistant_model=helper, **never), wanted)


@torch.no_grad()
def test_streamers():
    class Kept:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append(None)

    patched, streamer, tokens = model(), Kept(), tiny.ids(1, 12)
    got = generate(patched, tokens, streamer=streamer)
    assert streamer.tokens == [*got[0].tolist(), None]


@torch.no_grad()
def test_embeddings_instead_of_ids():
    patched = model()
    tokens = tiny.ids(2, 20)
    embeddings = patched.get_input_embeddings()(tokens)
    mask = torch.ones_like(tokens)
    got = patched.generate(
        inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(got, by_hand(patched, tokens, LENGTH)[:, 20:])


@pytest.mark.parametrize("implementation", ["static", "offloaded"])
@torch.no_grad()
def test_refuses_caches(implementation):
    patched = model()
    # A static cache comes with a mask of four dimensions in older versions of transformers.
    with pytest.raises(ValueError, match=r"must be a DynamicCache|must have shape \[batch"):
        generate(patched, tiny.ids(), cache_implementation=implementation, disable_compile=True)


@torch.no_grad()
def test_a_prompt_of_one_token():
    patched = model()
    tokens = tiny.ids(2, 1)
    assert torch.equal(generate(patched, tokens), by_hand(patched, tokens, LENGTH))


@torch.no_grad()
def test_bf16_and_switching():
    patched = model(dtype=torch.float32).to(torch.bfloat16)
    tokens = tiny.ids(2, 20)
    first = generate(patched, tokens)
    with vk.use_ratio(patched, 1):
        dense = generate(patched, tokens)
    vk.unpatch(patched)
    assert torch.equal(generate(patched, tokens), dense)
    assert first.shape == dense.shape


@torch.no_grad()
def test_compiled_steps():
    patched = model(num_hidden_layers=2)
    tokens = tiny.ids(2, 26)
    whole = patched(tokens, use_cache=False).logits
    torch._dynamo.reset()
    step = torch.compile(patched, backend="aot_eager")
    cache = DynamicCache()
    patched(tokens[:, :11], past_key_values=cache)
    for at in range(11, 26):
        got = step(tokens[:, at : at + 1], past_key_values=cache).logits
        torch.testing.assert_close(got, whole[:, at : at + 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ratio", [{"attention_kv": 3}, {"attention_kv": 3, "ffn": 2}])
@torch.no_grad()
def test_a_compiled_prompt_knows_its_mask(ratio):
    model = tiny.patched("llama", ratio, num_hidden_layers=2)
    tokens, mask = tiny.ids(2, 20), torch.ones(2, 20).long()
    mask[0, :5] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for given in (None, mask):
        wanted = model(tokens, attention_mask=given).logits
        assert torch.equal(compiled(tokens, attention_mask=given).logits, wanted)
