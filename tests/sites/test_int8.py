"""precision="int8": patched models against the definition in float64; where it does not hold."""

from __future__ import annotations

import copy

import pytest
import torch

import variator_kernels as vk
from tests.decoders import tiny as decoders
from tests.sites import int8_cases, tiny
from tests.sites.int8_cases import (
    DECODERS,
    FAMILIES,
    OFF,
    defined,
    distance,
    forward,
    pair,
    ready,
    small_layers,  # noqa: F401 - a fixture
)
from variator_kernels.ops.packed import cache
from variator_kernels.sites.find import find

pytestmark = int8_cases.marks


@pytest.mark.parametrize("name", [*FAMILIES, *DECODERS])
@torch.no_grad()
def test_is_what_it_is_defined_as(name):
    """Compressed and dense, ragged rows, and tokens that stay whole."""
    model, exact, batch = ready(name)
    truth = defined(exact)
    for level in (None, 1):
        for made in (model, exact, truth):
            if level is not None:
                vk.set_ratio(made, level)
        found, expected = forward(model, *batch), forward(truth, *batch)
        assert distance(found, expected) < OFF
        # The test sees int8, whose weights of 8 bits cost half of what 7 bits do.
        assert distance(forward(exact, *batch), expected) > 4 * distance(found, expected)
        assert not torch.equal(found, forward(exact, *batch))


@pytest.mark.parametrize("name", ["t5", "mt5", "bert"])
@pytest.mark.parametrize("placement", ["ffn", "attention", "attention_kv"])
@torch.no_grad()
def test_left_padding_holes_and_empty_rows(name, placement):
    model, exact = pair(name, {placement: 3})
    truth = defined(exact)
    ids, mask = tiny.batch(19, 7, 12, left=True)
    mask[0, 5:9] = 0
    mask[1] = 0
    assert distance(forward(model, ids, mask), forward(truth, ids, mask)) < OFF


@pytest.mark.parametrize("name", ["t5", "bert", "llama"])
@torch.no_grad()
def test_bf16(name):
    model, exact, batch = ready(name, dtype=torch.bfloat16)
    found, expected = forward(model, *batch), forward(defined(exact), *batch)
    assert found.dtype == torch.bfloat16
    error = distance(found, expected)
    plain_error = distance(forward(exact, *batch), forward(copy.deepcopy(exact).double(), *batch))
    # Rounding to bf16 makes more last bits a step of a 127th.
    assert error < 5 * plain_error + OFF


@torch.no_grad()
def test_decoding_in_steps():
    """A prompt at once, in pieces, and step by step; generate."""
    model, _ = pair("llama", {"attention_kv": 3})
    tokens = decoders.ids()
    expected = model(tokens).logits
    for cuts in ([11, 29], [27, 28, 29]):
        found, _ = decoders.in_pieces(model, tokens, cuts)
        assert distance(found, expected.double()) < 3 * OFF
    out = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert out.shape == (2, 34)


@pytest.mark.parametrize("name", ["t5", "bert"])
@torch.no_grad()
def test_a_row_depends_on_itself_alone(name):
    model, _, (ids, mask) = ready(name)
    for level in (None, 1):
        if level is not None:
            vk.set_ratio(model, level)
        alone = forward(model, ids[1:2, :7], mask[1:2, :7])
        together = forward(model, ids, mask)[19 : 19 + 7]
        assert distance(alone, together.double()) < OFF


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@torch.no_grad()
def test_nan_stays_in_its_group(value):
    model, _ = pair("t5", {"ffn": 4}, keep_first=0)
    layer = find(model).layers[0]
    x = torch.randn(1, 19, 24)
    clean = layer(x)
    x[0, 9] = value
    found = layer(x)
    assert found[0, 8:12].isnan().any(-1).all()
    others = [t for t in range(19) if not 8 <= t < 12]
    assert torch.equal(found[0, others], clean[0, others])


@torch.no_grad()
def test_a_changed_weight_is_noticed():
    model, exact, batch = ready("bert")
    for level in (None, 1):
        for made in (model, exact):
            if level is not None:
                vk.set_ratio(made, level)
        before = forward(model, *batch)
        for made in (model, exact):
            for layer in find(made).layers:
                layer.intermediate.dense.weight.data.mul_(-1.5)
                layer.output.dense.bias.data.add_(0.5)
        found = forward(model, *batch)
        assert distance(found, before.double()) > 0.05
        assert distance(found, forward(defined(exact), *batch)) < OFF


@torch.no_grad()
def test_the_large_weights_are_packed_once_in_int8():
    # Wider than the other models, for panels may be padded to 64 numbers; and frozen: weights so
    # small may share pages with what is written.
    model, exact = (
        vk.freeze(vk.patch(tiny.model("bert", d_model=64, d_ff=256), 2, (2,), 6, precision=of))
        for of in ("int8", None)
    )
    batch = tiny.batch(19, 7, 12)
    for made in (model, exact):
        forward(made, *batch)
    weight = find(model).layers[0].intermediate.dense.weight
    twin = find(exact).layers[0].intermediate.dense.weight
    assert cache.nbytes([weight]) < cache.nbytes([twin]) / 2
    vk.set_ratio(model, 1)
    size = cache.nbytes([weight])
    forward(model, *batch)
    assert cache.nbytes([weight]) == size  # the dense level reads the same copies
    vk.unpatch(model)
    assert cache.nbytes([weight]) == 0
