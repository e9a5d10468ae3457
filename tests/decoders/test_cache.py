"""The cache of merged keys: pieces, padding, what it holds, what transformers does with it."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

import variator_kernels as vk
from tests.decoders import tiny
from variator_kernels.sites.merged_cache import MergedLayer

SCHEMES = [(2, 0, 0), (2, 1, 3), (3, 5, 2), (4, 7, 1), (5, 3, 4), (8, 64, 4)]


def model(ratio=3, window=5, kept=2, **settings):
    return tiny.patched(
        ratio={"attention_kv": ratio},
        window=window,
        keep_first=kept,
        num_hidden_layers=2,
        **settings,
    )


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_pieces_of_every_family(family):
    patched = tiny.patched(family, window=5, keep_first=2)
    tokens = tiny.ids()
    whole = patched(tokens, use_cache=False).logits
    close(tiny.in_pieces(patched, tokens, [11, 12, 20, 29])[0], whole)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cuts", tiny.CUTS, ids=str)
@torch.no_grad()
def test_pieces(scheme, cuts):
    patched = model(*scheme)
    tokens = tiny.ids()
    whole = patched(tokens, use_cache=False).logits
    close(tiny.in_pieces(patched, tokens, cuts)[0], whole)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(scheme, side):
    patched = model(*scheme)
    lengths = [29, 20, 4, 1]
    tokens, mask, positions = tiny.padded(lengths, side)
    for cuts in ([29], [3, 11, 12, 13, 14, 29], list(range(1, 30))):
        got, _ = tiny.in_pieces(patched, tokens, cuts, attention_mask=mask, position_ids=positions)
        for row, _length in enumerate(lengths):
            own = tokens[row][mask[row] > 0][None]
            close(got[row][mask[row] > 0], patched(own, use_cache=False).logits[0])


@torch.no_grad()
def test_holes():
    """Padding that comes between tokens, as in a batch of chats, is not there."""
    patched = model()
    tokens, _, _ = tiny.padded([29, 29], "left")
    mask = torch.ones_like(tokens)
    mask[0, 4:9] = mask[1, 10:12] = mask[1, 20] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for cuts in ([29], [6, 7, 8, 15, 29], list(range(1, 30))):
        got, _ = tiny.in_pieces(patched, tokens, cuts, attention_mask=mask, position_ids=positions)
        for row in range(2):
            own = tokens[row][mask[row] > 0][None]
            close(got[row][mask[row] > 0], patched(own, use_cache=False).logits[0])


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_holds_what_the_specification_says(scheme):
    ratio, window, kept = scheme
    patched = model(*scheme)
    tokens, cache = tiny.ids(1, 40), DynamicCache()
    for end in range(1, 41):
        patched(tokens[:, end - 1 : end], past_key_values=cache)
        s = end - 1 - kept
        groups, plain = tiny.seen(cache.layers[0].scheme, s) if s >= 0 else (0, [])
        for layer in cache.layers:
            counts = layer.counts()
            assert counts["visible"] == [min(end, kept) + groups + len(plain)]
            complete = max(0, s + 1) // ratio
            assert counts["hidden"] == [complete - groups]
            assert counts["unfinished"] == [max(0, s + 1) % ratio]
            held = window + ratio + kept + complete
            assert layer.merged_keys.shape[2] <= held + 5 and layer.recent.shape[1] == ratio
        assert cache.get_seq_length() == end


@torch.no_grad()
def test_memory():
    """Of 2,048 tokens at k=4 and a window of 64 less than 29 % is left."""
    patched = tiny.patched(
        ratio={"attention_kv": 4}, window=64, keep_first=4, head_dim=64, num_hidden_layers=1
    )
    plain, merged = DynamicCache(), DynamicCache()
    tokens = tiny.ids(2, 2049)
    for n in (slice(0, 2048), slice(2048, 2049)):
        patched(tokens[:, n], past_key_values=merged)
        with vk.use_ratio(patched, 1):
            patched(tokens[:, n], past_key_values=plain)
    own = sum(
        t.nbytes
        for layer in merged.layers
        for t in (layer.merged_keys, layer.merged_values, layer.recent)
    )
    theirs = sum(t.nbytes for layer in plain.layers for t in (layer.keys, layer.values))
    assert own <= 0.29 * theirs


@pytest.mark.parametrize("at", [0, 7, 17, 25])
@torch.no_grad()
def test_no_token_moves_an_earlier_one(at):
    patched = model()
    tokens = tiny.ids(1)
    other = tokens.clone()
    other[0, at] = (other[0, at] - 3 + 1) % 40 + 3
    first, second = (patched(t, use_cache=False).logits for t in (tokens, other))
    assert torch.equal(first[:, :at], second[:, :at])
    assert not torch.equal(first[:, at:], second[:, at:])


@torch.no_grad()
def test_rows_are_picked_and_repeated():
    patched = model()
    tokens = tiny.ids(3, 33)
    whole = patched(tokens, use_cache=False).logits
    order = torch.tensor([2, 0, 0, 1])
    for change in ("reorder_cache", "batch_select_indices"):
        _, cache = tiny.in_pieces(patched, tokens[:, :29], [11, 28, 29])
        getattr(cache, change)(order)
        got = patched(tokens[order, 29:31], past_key_values=cache).logits
        close(got, whole[order, 29:31])
    _, cache = tiny.in_pieces(patched, tokens[:, :29], [11, 29])
    cache.batch_repeat_interleave(2)
    got, _ = tiny.in_pieces(patched, tokens.repeat_interleave(2, 0)[:, 29:], [1, 2, 4], cache)
    close(got, whole.repeat_interleave(2, 0)[:, 29:])


@torch.no_grad()
def test_copies():
    patched = model()
    tokens = tiny.ids(2, 33)
    whole = patched(tokens, use_cache=False).logits
    _, cache = tiny.in_pieces(patched, tokens[:, :29], [11, 28, 29])
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        close(patched(tokens[:, 29:30], past_key_values=other).logits, whole[:, 29:30])
    close(patched(tokens[:, 29:], past_key_values=cache).logits, whole[:, 29:])
    cache.reset()
    assert cache.get_seq_length() == 0
    close(patched(tokens, past_key_values=cache).logits, whole)


def remove(cache, tokens):
    cache.crop(-tokens)


@pytest.mark.parametrize("back", [1, 2, 5, 12])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_crop(scheme, back):
    """What a forward brought can be taken back, in one go or in several."""
    patched = model(*scheme)
    tokens = tiny.ids(2, 45)
    whole = patched(tokens, use_cache=False).logits
    for steps in ([back], [1] * back):
        _, cache = tiny.in_pieces(patched, tokens[:, :29], [15, 16, 29])
        for step in steps:
            remove(cache, step)
        assert cache.get_seq_length() == 29 - back
        begin = 29 - back
        got, _ = tiny.in_pieces(patched, tokens[:, begin:], [1, 2, 7, 45 - begin], cache)
        close(got, whole[:, begin:])


@torch.no_grad()
def test_crop_refuses_what_is_gone():
    patched = model()
    tokens = tiny.ids(2, 29)
    _, cache = tiny.in_pieces(patched, tokens, list(range(1, 30)))
    with pytest.raises(ValueError, match="crop cannot take back 9 tokens"):
        remove(cache, 9)
    with pytest.raises(ValueError, match="at most 29"):
        remove(cache, 30)
    tokens, mask, positions = tiny.padded([29, 20], "right")
    _, cache = tiny.in_pieces(patched, tokens, [29], attention_mask=mask, position_ids=positions)
    with pytest.raises(ValueError, match="padding"):
        remove(cache, 2)


@torch.no_grad()
def test_refuses_other_caches():
    patched = model()
    tokens = tiny.ids()
    with pytest.raises(ValueError, match="must be a DynamicCache"):
        patched(tokens, past_key_values=StaticCache(config=patched.config, max_cache_len=64))
    cache = DynamicCache()
    with vk.use_ratio(patched, 1):
        patched(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="holds plain keys"):
        patched(tokens, past_key_values=cache)
    cache = DynamicCache()
    patched(tokens, past_key_values=cache)
    assert all(isinstance(layer, MergedLayer) for layer in cache.layers)
    with vk.use_ratio(patched, 1), pytest.raises(ValueError, match="holds merged keys"):
        patched(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="of 1 rows"):
        patched(tokens[:1], past_key_values=cache)


@torch.no_grad()
def test_refuses_another_ratio_on_a_filled_cache():
    patched = tiny.patched(
        ratio={"attention_kv": 2}, ratios={"attention_kv": (2, 4)}, num_hidden_layers=2
    )
    tokens, cache = tiny.ids(), DynamicCache()
    patched(tokens, past_key_values=cache)
    with vk.use_ratio(patched, 4), pytest.raises(ValueError, match="was filled at"):
        patched(tokens[:, :1], past_key_values=cache)
    cache.reset()
    with vk.use_ratio(patched, 4):
        patched(tokens, past_key_values=cache)
        assert cache.layers[0].scheme.ratio == 4


@torch.no_grad()
def test_refuses_another_mask_of_the_past():
    patched = model()
    tokens, mask, positions = tiny.padded([29, 20], "left")
    _, cache = tiny.in_pieces(patched, tokens, [29], attention_mask=mask, position_ids=positions)
    longer = torch.ones(2, 30, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask must show the tokens"):
        patched(tokens[:, :1], past_key_values=cache, attention_mask=longer)


def test_refuses_gradients_through_a_filled_cache():
    patched = model()
    tokens, cache = tiny.ids(), DynamicCache()
    patched(tokens, past_key_values=cache)  # as a training step does that forgets use_cache
    loss = patched(tokens[:, :2], past_key_values=cache).logits.sum()
    with pytest.raises(ValueError, match="use_cache=False"):
        loss.backward()


@pytest.mark.parametrize("layers", [{0: 3}, {1: 3}, {-1: 3}], ids=str)
@torch.no_grad()
def test_layers_that_differ(layers):
    """Some merge, some do not, on one cache."""
    patched = tiny.patched(ratio={"attention_kv": layers}, window=5, keep_first=2)
    tokens = tiny.ids()
    whole = patched(tokens, use_cache=False).logits
    close(tiny.in_pieces(patched, tokens, [11, 12, 13, 29])[0], whole)
    tokens, mask, positions = tiny.padded([29, 20], "left")
    got, _ = tiny.in_pieces(
        patched, tokens, [11, 12, 29], attention_mask=mask, position_ids=positions
    )
    own = tokens[1, 9:][None]
    close(got[1, 9:], patched(own, use_cache=False).logits[0])


@torch.no_grad()
def test_refuses_a_mask_that_moved():
    """As many tokens as before, but others; or none at all behind a padded prompt."""
    patched = model()
    tokens, mask, positions = tiny.padded([29, 29], "left")
    mask[0, 3] = 0
    _, cache = tiny.in_pieces(patched, tokens, [29], attention_mask=mask, position_ids=positions)
    moved = torch.ones(2, 30, dtype=torch.long)
    moved[0, 9] = 0
    for given in ({"attention_mask": moved}, {}):
        with pytest.raises(ValueError, match="attention_mask must show the tokens"):
            patched(tokens[:, :1], past_key_values=cache, **given)
    right = torch.cat((mask, mask[:, -1:]), 1)
    patched(tokens[:, :1], past_key_values=cache, attention_mask=right)


@pytest.mark.parametrize("ratio", [{"attention_kv": {1: 3}}, {"attention_kv": {0: 3}}], ids=str)
@torch.no_grad()
def test_what_is_refused_changes_nothing(ratio):
    patched = tiny.patched(ratio=ratio, window=5, keep_first=2, num_hidden_layers=2)
    tokens, cache = tiny.ids(2, 33), DynamicCache()
    whole = patched(tokens, use_cache=False).logits
    patched(tokens[:, :29], past_key_values=cache)
    hidden = torch.ones(2, 31, dtype=torch.long)
    hidden[:, 4] = 0
    with vk.use_ratio(patched, 1), pytest.raises(ValueError, match="holds merged keys"):
        patched(tokens[:, 29:31], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask must show"):
        patched(tokens[:, 29:31], past_key_values=cache, attention_mask=hidden)
    with pytest.raises(ValueError, match="of 1 rows"):
        patched(tokens[:1, 29:31], past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [29, 29]
    close(patched(tokens[:, 29:], past_key_values=cache).logits, whole[:, 29:])


@torch.no_grad()
def test_nobody_takes_merged_keys_for_those_of_tokens():
    patched = model()
    tokens, cache = tiny.ids(), DynamicCache()
    patched(tokens, past_key_values=cache)
    with vk.use_ratio(patched, 1), pytest.raises((TypeError, ValueError, AttributeError)):
        patched(tokens[:, :1], past_key_values=DynamicCache([part[:2] for part in cache]))


@torch.no_grad()
def test_an_emptied_cache_serves_any_level():
    patched = model()
    tokens, cache = tiny.ids(), DynamicCache()
    whole = patched(tokens, use_cache=False).logits
    patched(tokens, past_key_values=cache)
    remove(cache, 29)
    close(patched(tokens, past_key_values=cache).logits, whole)
    cache.reset()
    with vk.use_ratio(patched, 1):
        patched(tokens, past_key_values=cache)
        patched(tokens[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_wide_window_needs_no_room():
    patched = model(window=200_000)
    tokens, cache = tiny.ids(1, 150), DynamicCache()
    whole = patched(tokens, use_cache=False).logits
    got, _ = tiny.in_pieces(patched, tokens[:, :149], [29, *range(30, 150)], cache)
    close(got, whole[:, :149])
    assert cache.layers[0].merged_keys.shape[2] < 300


def test_refuses_what_is_no_cache():
    patched = model()
    with pytest.raises(ValueError, match="past_key_values must be a Cache, got a tuple"):
        patched(tiny.ids(), past_key_values=((torch.zeros(1), torch.zeros(1)),))

    class Own(DynamicCache):
        def update(self, *args, **kwargs):
            return super().update(*args, **kwargs)

    with pytest.raises(ValueError, match="must be a DynamicCache"):
        patched(tiny.ids(), past_key_values=Own())


@torch.no_grad()
def test_a_cache_leaves_inference_mode():
    model, tokens = tiny.patched("llama", {"attention_kv": 3}, window=5), tiny.ids(1, 24)
    for first in (20, 21):
        cache = DynamicCache()
        with torch.inference_mode():
            model(tokens[:, :first], past_key_values=cache)
            model(tokens[:, first : first + 1], past_key_values=cache)
        rest = [
            model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(first + 1, 24)
        ]
        wanted = model(tokens).logits[:, first + 1 :]
        torch.testing.assert_close(torch.cat(rest, 1), wanted)
