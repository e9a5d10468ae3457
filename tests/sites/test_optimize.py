"""``optimize=``: packed products at dense levels, in patched sublayers or in all of the encoder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.ops.cases import needs_cpu
from tests.sites.optimize_cases import batch, forward, plain, swapped
from variator_kernels.ops import int8_linear, prepack
from variator_kernels.sites.find import find

pytestmark = needs_cpu
BOTH = {"ffn": 2, "attention_kv": 2}
NAMES = ["bert", "modernbert", "t5", "llama"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dense_level_is_as_near_to_float64_as_the_original(name, dtype):
    model = plain(name, dtype)
    exact, own = forward(plain(name, dtype).double()), forward(model)
    vk.patch(model, 1, (2,), 8, optimize="encoder")
    found = forward(model)
    blocks = find(model).blocks
    linear = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    assert linear and swapped(model) == linear
    assert "all linear layers of the encoder's blocks run packed" in vk.describe(model)
    assert all(prepack.cache.nbytes([layer.weight]) > 0 for layer in linear)
    allowed = 2 * (own.double() - exact).abs().max() + 1e-6
    assert (found.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", [None, "int8"])
def test_compressed_levels_and_undoing(name, precision):
    if precision and int8_linear.kernel() is None:
        pytest.skip(f"int8 products: {int8_linear.describe()}")
    model = plain(name)
    before, classes = forward(model), [type(m) for m in model.modules()]
    try:
        reference = vk.patch(copy.deepcopy(model), BOTH, (2,), 8, backend="reference")
    except ValueError as error:
        if "another version of transformers" in str(error):
            pytest.skip(str(error))
        raise
    vk.patch(model, BOTH, (2,), 8, optimize="encoder", precision=precision)
    expected, found = forward(reference), forward(model)
    off = (found - expected).norm() / expected.norm()
    assert (1e-5 if precision else 0) < off < (3e-2 if precision else 1e-5)
    vk.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(forward(model), before)


def test_sublayers_alone():
    model = vk.patch(plain("bert"), 1, (2,), 8, optimize="sublayers")
    layer = find(model).blocks[0]
    assert swapped(layer) == [layer.intermediate.dense, layer.output.dense]
    vk.unpatch(model)
    vk.patch(model, 1, {"ffn": (2,), "attention_kv": (2,)}, 8, optimize="sublayers")
    assert len(swapped(find(model).blocks[0])) == 6


def test_without_it_a_dense_level_is_the_original():
    model = plain("bert")
    before = forward(model)
    assert not swapped(vk.patch(model, 1, (2,), 8))
    assert torch.equal(forward(model), before)


def test_gradients_are_the_originals():
    def gradient(optimize):
        model = vk.patch(plain("bert"), 2, (2,), 8, optimize=optimize).train()
        given = batch()
        embedded = model.embeddings(given.pop("input_ids")).detach().requires_grad_()
        torch.manual_seed(3)
        model(inputs_embeds=embedded, **given).last_hidden_state.square().sum().backward()
        return embedded.grad

    assert torch.equal(gradient("encoder"), gradient(None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimize": "all"}, r"optimize must be one of .*'sublayers', 'encoder'.*got 'all'"),
        ({"optimize": True}, "optimize must be one of"),
        ({"optimize": "encoder", "pack": False}, "pack must be True with optimize='encoder'"),
    ],
)
def test_refusals(settings, message):
    model = plain("bert")
    with pytest.raises(ValueError, match=message):
        vk.patch(model, 2, **settings)
    assert not swapped(model)


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({}, None),
        ({"optimize": "sublayers"}, "linear layers of patched sublayers run packed at"),
        ({"precision": "int8"}, "linear layers of patched sublayers run in int8 at"),
        ({"precision": "int8", "optimize": "encoder"}, "the encoder's blocks run in int8"),
    ],
)
def test_describe_says_what_runs_at_dense_levels(settings, row, monkeypatch):
    model = vk.patch(plain("bert"), 2, (2,), 8, **settings)
    lines = [line for line in vk.describe(model).splitlines() if line.startswith("optimized")]
    precision = settings.get("precision")
    if precision and int8_linear.kernel() is None:
        row = "nothing: linear layers run as they did"
    assert [row in line for line in lines] == ([] if row is None else [True])
    if precision:
        monkeypatch.setattr(int8_linear, "kernel", lambda: None)
        assert "nothing: linear layers run as they did" in vk.describe(model)


@pytest.mark.parametrize("level", [1, 2])
def test_a_table_of_distances_that_alone_is_trained_gets_its_gradient(level):
    gradients = []
    for backend in ("reference", "cpu"):
        model = plain("t5")
        more = {"placements": ("attention_kv",), "optimize": "encoder", "backend": backend}
        vk.patch(model, level, (2,), **more)
        model.requires_grad_(False)
        (table,) = (p for name, p in model.named_parameters() if "relative_attention_bias" in name)
        table.requires_grad_()
        model(**batch()).last_hidden_state.square().sum().backward()
        gradients.append(table.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert gradients[0].abs().max() > 0
