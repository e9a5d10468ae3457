"""Merged keys in a decoder against the specification, said with loops in float64."""

import inspect

import pytest
import torch

import variator_kernels as vk
from tests.decoders import tiny
from variator_kernels.ops.self_attention import Scheme


def layers(model):
    return model.model.layers


@torch.no_grad()
def expected(model, tokens, scheme, positions):
    """Hidden states behind the last block, of one row of real tokens."""
    base = model.model
    taken = []
    hook = layers(model)[0].register_forward_pre_hook(
        lambda _, args, kwargs: taken.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    base(tokens[None], use_cache=False)
    hook.remove()
    x = taken[0][0]
    rotary = base.rotary_emb
    kinds = getattr(base.config, "layer_types", None)
    for number, block in enumerate(layers(model)):

        def turn(h, places, number=number):
            takes = "layer_type" in inspect.signature(inspect.unwrap(rotary.forward)).parameters
            extra = (kinds[number],) if takes else ()
            return rotary(h, places, *extra)

        names = dict(block.named_children())
        h = x if "input_layernorm" not in names else block.input_layernorm(x)
        o = tiny.attention_of_row(block.self_attn, h, positions, scheme, turn)
        post = "pre_feedforward_layernorm" in names or "input_layernorm" not in names
        x = x + (block.post_attention_layernorm(o) if post else o)
        if "pre_feedforward_layernorm" in names:
            x = x + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))
        elif post:
            x = x + block.post_feedforward_layernorm(block.mlp(x))
        else:
            x = x + block.mlp(block.post_attention_layernorm(x))
    return base.norm(x)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_families(family, backend):
    model = tiny.patched(family, keep_first=2, window=5, backend=backend)
    tokens = tiny.ids(1, 23)
    wanted = expected(model, tokens[0], Scheme(3, 5, 2), list(range(23)))
    got = model.model(tokens, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ratio", [2, 3, 5, 8])
@pytest.mark.parametrize("window", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("kept", [0, 1, 4])
def test_schemes(ratio, window, kept):
    model = tiny.patched(
        ratio={"attention_kv": ratio}, keep_first=kept, window=window, num_hidden_layers=2
    )
    for n in (1, 2, kept + ratio, 21):
        tokens = tiny.ids(1, n)
        wanted = expected(model, tokens[0], Scheme(ratio, window, kept), list(range(n)))
        got = model.model(tokens, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_everything_in_the_window_is_dense(family):
    model = tiny.patched(family, window=64)
    tokens = tiny.ids()
    with vk.use_ratio(model, 1):
        wanted = model(tokens).logits
    # Some of transformers' own attentions have their softmax in fp32.
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ratio_1_and_unpatch_are_the_original(family):
    tokens = tiny.ids()
    wanted = tiny.model(family)(tokens).logits
    model = tiny.patched(family, {"ffn": 4, "attention_kv": 3})
    vk.set_ratio(model, 1)
    assert torch.equal(model(tokens).logits, wanted)
    keys = set(vk.unpatch(model).state_dict())
    assert torch.equal(model(tokens).logits, wanted)
    assert keys == set(tiny.model(family).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    exact = tiny.patched(keep_first=2, window=5)
    rounded = tiny.patched(keep_first=2, window=5).to(dtype)
    plain = tiny.patched(keep_first=2, window=5, backend="reference").to(dtype)
    tokens = tiny.ids()
    wanted = exact(tokens).logits
    error, allowed = (
        (model(tokens).logits.double() - wanted).abs().max() for model in (rounded, plain)
    )
    assert error <= 2 * allowed + 1e-6
