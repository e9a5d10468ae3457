"""``optimize=`` and what happens to a model after patching: weights, layers, copies, compilers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.ops.cases import needs_cpu
from tests.sites.optimize_cases import batch, forward, plain, swapped
from variator_kernels.sites.find import find

pytestmark = needs_cpu


def test_a_changed_weight_is_noticed():
    model = vk.patch(plain("bert"), 1, (2,), 8, optimize="encoder")
    forward(model)
    dense = find(model).blocks[0].attention.self.query
    dense.weight.data.mul_(3)
    twin = plain("bert")
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "plugins" not in k})
    torch.testing.assert_close(forward(model), forward(twin), rtol=1e-5, atol=1e-5)


def test_hooked_and_foreign_layers_stay():
    model = plain("bert")
    first = model.encoder.layer[0]
    first.attention.self.query.register_forward_hook(lambda *_: None)
    first.attention.self.key = type("Own", (nn.Linear,), {})(128, 128).requires_grad_(False)
    vk.patch(model, 1, (2,), 8, optimize="encoder")
    own = {id(first.attention.self.query), id(first.attention.self.key)}
    assert own.isdisjoint(map(id, swapped(model))) and len(swapped(model)) == 10


def test_copies_pickles_and_frozen_weights():
    model = vk.patch(plain("bert"), 2, (2,), 8, optimize="encoder")
    expected = forward(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(forward(made), expected)
    vk.freeze(model)
    assert torch.equal(forward(model), expected)  # and packs what was not packed before
    weight = find(model).blocks[0].attention.self.query.weight
    weight.data.mul_(3)  # against the promise: nobody looks
    assert torch.equal(forward(model), expected)
    vk.thaw(model)
    assert not torch.equal(forward(model), expected)


def test_weights_that_somebody_changed_since_multiply_as_they_are():
    """Quantised, pruned, parametrised after patching: their own products run, freeze looks away."""

    class Tenfold(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            return out * 10 if func is torch.nn.functional.linear else out

    for precision in (None, "int8"):
        model = vk.patch(plain("bert"), 1, (2,), 8, optimize="encoder", precision=precision)
        first = find(model).blocks[0]
        dense = first.attention.self.query
        x = torch.randn(50, 128)
        with torch.no_grad():
            expected = nn.functional.linear(x, dense.weight, dense.bias)
            dense.weight = nn.Parameter(dense.weight.data.as_subclass(Tenfold), requires_grad=False)
            found = dense(x).as_subclass(torch.Tensor)
        torch.testing.assert_close(found, 10 * expected, rtol=1e-4, atol=1e-4)
        vk.freeze(model)
        vk.thaw(model)


def test_undoing_refuses_what_would_be_lost():
    model = vk.patch(plain("bert"), 1, (2,), 8, optimize="encoder")
    query, key = (getattr(find(model).blocks[0].attention.self, n) for n in ("query", "key"))
    old = query.forward
    query.forward = lambda t: old(t)
    with pytest.raises(ValueError, match="forward of Linear was replaced after patching"):
        vk.unpatch(model)
    del query.forward
    nn.utils.parametrize.register_parametrization(key, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"after patching \(parametrised"):
        vk.unpatch(model)
    forward(model)


def test_compiled():
    torch._dynamo.reset()
    model = vk.patch(plain("bert"), 2, (2,), 8, optimize="encoder")
    given = batch()

    def run(ids, mask):
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        found = compiled(given["input_ids"], given["attention_mask"])
        torch.testing.assert_close(found, run(*given.values()), rtol=1e-4, atol=1e-5)
