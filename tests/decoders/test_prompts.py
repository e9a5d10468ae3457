"""The FFN of a decoder: compressed in prompts, in whole groups, and dense everywhere else."""

import pytest
import torch
from transformers import DynamicCache

import variator_kernels as vk
from tests.decoders import tiny


def model(ratio=4, family="llama", **settings):
    return tiny.patched(family, {"ffn": ratio}, num_hidden_layers=2, **settings)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def ffn_of_row(mlp, plugin, h, kept, ratio):
    """The specification with loops: ``h [n, d]``; ``kept``: numbers of tokens that stay whole."""
    dense, merge, adapter = mlp.feed_forward, plugin.merge, plugin.adapter
    out, group = [None] * len(h), []
    for number in range(len(h) + 1):
        if number < len(h) and number not in kept:
            group.append(number)
        ends = number == len(h) or number in kept
        if len(group) == ratio or (ends and group):
            if number == len(h) and len(group) < ratio:
                for at in group:
                    out[at] = dense(h[at])
            else:
                vectors = torch.zeros(ratio, h.shape[1], dtype=h.dtype)
                vectors[: len(group)] = h[group]
                scores = (merge.weight @ vectors.flatten() + merge.bias)[: len(group)]
                u = dense(scores.softmax(0) @ h[group])
                for at in group:
                    inner = torch.tanh(adapter.w1 @ torch.cat((u, h[at])) + adapter.b1)
                    out[at] = u + adapter.w2 @ inner + adapter.b2
            group = []
        if number in kept:
            out[number] = dense(h[number])
    return torch.stack(out)


class _Dense:
    def __init__(self, mlp):
        self.mlp = mlp

    def feed_forward(self, vector):
        return type(self.mlp).variator_original.forward(self.mlp, vector[None, None])[0, 0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("n", [1, 2, 3, 6, 14, 23])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@torch.no_grad()
def test_truth(family, n, backend):
    patched = model(family=family, keep_first=2, backend=backend)
    tokens = tiny.ids(1, n)
    mlp = patched.model.layers[0].mlp
    taken = {}
    hook = mlp.register_forward_hook(lambda _, args, out: taken.update(h=args[0], o=out))
    patched(tokens, use_cache=False)
    hook.remove()
    if n == 1:
        wanted = _Dense(mlp).feed_forward(taken["h"][0, 0])[None]
    else:
        wanted = ffn_of_row(_Dense(mlp), mlp.plugins["4"], taken["h"][0], {0, 1}, 4)
    close(taken["o"][0], wanted)


@pytest.mark.parametrize("last", [0, 3])
@torch.no_grad()
def test_tokens_that_are_kept(last):
    patched = model(keep_first=1, keep_last=last, keep=(7, 9))
    tokens = tiny.ids(1, 23)
    tokens[0, [5, 6, 13, 22]] = 7
    mlp, taken = patched.model.layers[0].mlp, {}
    hook = mlp.register_forward_hook(lambda _, args, out: taken.update(h=args[0], o=out))
    patched(tokens, use_cache=False)
    hook.remove()
    kept = {0, *(i for i, t in enumerate(tokens[0].tolist()) if t in (7, 9))}
    kept |= set(range(23 - last, 23))
    close(taken["o"][0], ffn_of_row(_Dense(mlp), mlp.plugins["4"], taken["h"][0], kept, 4))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_depends_on_itself_alone(side):
    patched = model(keep_first=2)
    lengths = [23, 14, 9, 2, 1]
    tokens, mask, positions = tiny.padded(lengths, side)
    got = patched(tokens, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate(lengths):
        own = tokens[row][mask[row] > 0][None]
        if length == 1:  # by itself it would be a step of decoding, which is as dense
            with vk.use_ratio(patched, 1):
                close(got[row][mask[row] > 0], patched(own, use_cache=False).logits[0])
        else:
            close(got[row][mask[row] > 0], patched(own, use_cache=False).logits[0])


@torch.no_grad()
def test_which_earlier_positions_a_token_moves():
    patched = model(keep_first=2)
    tokens = tiny.ids(1, 23)  # groups: 2-5, 6-9, ..., 18-21; 22 is left over
    first = patched(tokens, use_cache=False).logits
    for at, begin in ((1, 1), (2, 2), (9, 6), (20, 18), (21, 18), (22, 22)):
        other = tokens.clone()
        other[0, at] = (other[0, at] - 3 + 1) % 40 + 3
        second = patched(other, use_cache=False).logits
        assert torch.equal(first[:, :begin], second[:, :begin])
        assert (first[:, begin] != second[:, begin]).any()


@torch.no_grad()
def test_steps_are_dense():
    patched = model(keep_first=2)
    tokens, cache = tiny.ids(2, 30), DynamicCache()
    patched(tokens[:, :20], past_key_values=cache)
    for at in range(20, 30):
        with vk.use_ratio(patched, 1):
            copy = DynamicCache()
            for number, layer in enumerate(cache.layers):
                copy.update(layer.keys.clone(), layer.values.clone(), number)
            wanted = patched(tokens[:, at : at + 1], past_key_values=copy).logits
        got = patched(tokens[:, at : at + 1], past_key_values=cache).logits
        assert torch.equal(got, wanted)


@torch.no_grad()
def test_a_second_turn_makes_its_own_groups():
    """keep_first counts on an empty cache alone."""
    patched = model(keep_first=2)
    tokens, cache = tiny.ids(1, 30), DynamicCache()
    patched(tokens[:, :14], past_key_values=cache)
    patched(tokens[:, 14:15], past_key_values=cache)
    mlp, taken = patched.model.layers[0].mlp, {}
    hook = mlp.register_forward_hook(lambda _, args, out: taken.update(h=args[0], o=out))
    patched(tokens[:, 15:30], past_key_values=cache)
    hook.remove()
    close(taken["o"][0], ffn_of_row(_Dense(mlp), mlp.plugins["4"], taken["h"][0], set(), 4))


@torch.no_grad()
def test_pieces_of_a_prompt_are_refused():
    patched = model()
    tokens, cache = tiny.ids(), DynamicCache()
    patched(tokens[:, :11], past_key_values=cache)
    with pytest.raises(ValueError, match="a prompt must come whole where ffn is compressed"):
        patched(tokens[:, 11:], past_key_values=cache)
    settings = {"do_sample": False, "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    with pytest.raises(ValueError, match="a prompt must come whole"):
        patched.generate(tiny.ids(1, 20), max_new_tokens=4, prefill_chunk_size=7, **settings)
    with pytest.raises(ValueError, match="no assisted decoding with ffn"):
        patched.generate(
            tiny.ids(1, 20), max_new_tokens=9, assistant_model=tiny.model(seed=1), **settings
        )
    vk.set_ratio(patched, 1)
    patched(tokens[:, 11:], past_key_values=cache)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_generate(family):
    """With both placements, of prompts of unequal length."""
    patched = tiny.patched(family, {"ffn": {1: 4}, "attention_kv": 3}, window=5, keep_first=2)
    tokens, mask, _ = tiny.padded([20, 11, 3], "left")
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = patched.generate(tokens, attention_mask=mask, **settings)
    for row, length in enumerate([20, 11, 3]):
        own = tokens[row : row + 1, 20 - length :]
        alone = patched.generate(own, attention_mask=torch.ones_like(own), **settings)
        assert torch.equal(alone[0], got[row, 20 - length :])


def test_gradients_against_the_reference():
    tokens, mask, positions = tiny.padded([23, 14], "left")
    found = []
    for backend in ("reference", "auto"):
        patched = tiny.patched(
            ratio={"ffn": 4, "attention_kv": 3}, ratios={"ffn": (4,), "attention_kv": (3,)},
            window=5, keep_first=2, backend=backend,
        )  # fmt: skip
        out = patched(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        out.logits[mask > 0].square().mean().backward()
        found.append([p.grad for p in vk.plugin_parameters(patched)])
        assert all(g is not None and g.abs().sum() > 0 for g in found[-1])
    for got, wanted in zip(*found, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    tokens = tiny.ids(2, 23)
    found = []
    for checkpointing in (False, True):
        patched = tiny.patched(ratio={"ffn": 4, "attention_kv": 3}, window=5, keep_first=2)
        patched.train()
        if checkpointing:
            patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with vk.use_ratio(patched, {"ffn": 4, "attention_kv": 3}):
            out = patched(tokens, use_cache=False)
        out.logits.square().mean().backward()
        found.append([p.grad for p in vk.plugin_parameters(patched)])
    for got, wanted in zip(*found, strict=True):
        close(got, wanted)


@torch.no_grad()
def test_pieces_are_known_however_the_cache_came_about():
    patched = model()
    tokens = tiny.ids()
    made = patched.model(tokens[:, :11], return_dict=False)
    cache = next(part for part in made if isinstance(part, DynamicCache))
    plain = DynamicCache()
    tiny.model(num_hidden_layers=2)(tokens[:, :11], past_key_values=plain)
    for given in (cache, plain):
        with pytest.raises(ValueError, match="a prompt must come whole"):
            patched(tokens[:, 11:], past_key_values=given)


@pytest.mark.parametrize("steps", [2, 3, 9])
@torch.no_grad()
def test_candidates_are_refused_from_the_first_on(steps):
    """They may come with the prompt, in whose groups they would be seen."""
    patched = model()
    tokens = tiny.ids(1, 4).repeat(1, 6)
    with pytest.raises(ValueError, match=r"ffn was compressed|must come whole"):
        patched.generate(
            tokens, max_new_tokens=steps, prompt_lookup_num_tokens=5, do_sample=False,
            eos_token_id=tiny.VOCABULARY, attention_mask=torch.ones_like(tokens),
        )  # fmt: skip


@pytest.mark.parametrize("ratio", [{"ffn": 4}, {"attention_kv": 3}], ids=str)
@torch.no_grad()
def test_refuses_what_only_dense_attention_looks_at(ratio):
    patched = tiny.patched(ratio=ratio, num_hidden_layers=2)
    tokens = tiny.ids()
    packed = torch.cat((torch.arange(13), torch.arange(16)))[None]
    with pytest.raises(ValueError, match="must not be packed"):
        patched(tokens, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match=r"must have shape \[batch, 29\]"):
        patched(tokens, attention_mask=torch.ones(2, 40, dtype=torch.long))
    with pytest.raises(ValueError, match="is_causal"):
        patched(tokens, is_causal=False)


@torch.no_grad()
def test_an_emptied_cache_can_be_cropped_again():
    patched = model()
    tokens, cache = tiny.ids(), DynamicCache()
    patched(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be cropped once ffn"):
        cache.crop(-1)
    cache.reset()
    if cache.get_seq_length():
        pytest.skip("reset() of this transformers fills a cache with zeros, it does not empty it")
    with vk.use_ratio(patched, 1):
        patched(tokens, past_key_values=cache)
        cache.crop(-4)
    assert cache.get_seq_length() == 25
