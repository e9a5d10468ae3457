"""Packed copies of a model's weights: switched off, frozen, told of, given back."""

from __future__ import annotations

import copy

import pytest
import torch

import variator_kernels as vk
from tests.ops.cases import needs_cpu
from tests.sites import tiny
from variator_kernels import extension, freezing
from variator_kernels.ops.packed import cache
from variator_kernels.sites.feed_forward import describe
from variator_kernels.sites.install import patched_sublayers

pytestmark = needs_cpu
EVERY = pytest.mark.parametrize(("family", "act"), tiny.VARIANTS)


def ready(family="t5", act="relu", **options):
    """A patched model and its forward on one batch."""
    model = tiny.model(family, act).eval().requires_grad_(False)
    vk.patch(model, 2, (2,), 8, **options)
    tiny.train_plugins(model)
    ids, mask = tiny.batch(19, 7, 12)
    return model, lambda: tiny.encode(model, ids, mask)


def w_in(model):
    return describe(patched_sublayers(model)[0]).w_in


@EVERY
@torch.no_grad()
def test_without_packing(family, act):
    packed, expected = ready(family, act)
    plain, found = ready(family, act, pack=False)
    plain.load_state_dict(packed.state_dict())
    torch.testing.assert_close(found(), expected(), rtol=1e-4, atol=1e-5)
    own = [t for layer in patched_sublayers(plain) for t in describe(layer)[:3] if t is not None]
    assert cache.nbytes(own) == 0 and cache.rules(own) == {}
    weights = [t for layer in patched_sublayers(packed) for t in describe(layer)[:2]]
    assert cache.nbytes(weights) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_without_packing_in_16_bits(dtype):
    model, _ = ready("bert", "gelu", pack=False)
    model.to(dtype)
    other = copy.deepcopy(model)
    state = next(m for m in other.modules() if hasattr(m, "variator_state")).variator_state
    state.method.config = state.method.config._replace(pack=True)
    outputs = [tiny.encode(m, *tiny.batch(19, 7, 12)).float() for m in (model, other)]
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("pack", [None, 1, "yes"])
def test_pack_is_a_flag(pack):
    model = tiny.model()
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=f"pack must be True or False, got {pack!r}"):
        vk.patch(model, 2, pack=pack)
    assert set(model.state_dict()) == before


@EVERY
@torch.no_grad()
def test_a_frozen_model(family, act):
    model, forward = ready(family, act)
    before = forward()
    assert vk.freeze(model) is model
    assert torch.equal(forward(), before)
    assert set(cache.rules([w_in(model)])) == {"frozen"}
    neuron = w_in(model).data[3].clone()
    w_in(model).data[3] = 9.0  # against the promise: nobody looks
    assert torch.equal(forward(), before)
    assert vk.thaw(model) is model
    assert not torch.equal(forward(), before)
    w_in(model).data[3] = neuron
    assert torch.equal(forward(), before)


@torch.no_grad()
def test_writes_that_pytorch_counts_after_freezing():
    model, forward = ready()
    vk.freeze(model)
    forward()
    model.load_state_dict({name: t * 0.5 for name, t in model.state_dict().items()})
    with pytest.raises(RuntimeError, match=r"written after vk\.freeze\(model\).*vk\.thaw\(model\)"):
        forward()
    vk.thaw(model)
    after = forward()
    vk.set_ratio(model, 2)
    torch.testing.assert_close(forward(), after)


@torch.no_grad()
def test_plugins_may_change_while_the_model_is_frozen():
    model, forward = ready()
    vk.freeze(model)
    before = forward()
    for parameter in vk.plugin_parameters(model):
        parameter.data.mul_(3)
    assert not torch.equal(forward(), before)


@torch.no_grad()
def test_a_copy_is_not_frozen():
    model, _ = ready()
    vk.freeze(model)
    other = copy.deepcopy(model)
    before = tiny.encode(other, *tiny.batch(19, 7, 12))
    w_in(other).data[3] = 9.0
    assert not torch.equal(tiny.encode(other, *tiny.batch(19, 7, 12)), before)


@pytest.mark.parametrize("call", [vk.freeze, vk.thaw])
def test_only_patched_models_are_frozen(call):
    with pytest.raises(ValueError, match="model is not patched"):
        call(tiny.model())


@torch.no_grad()
def test_what_is_told():
    model, forward = ready()
    assert freezing.packed_weights(model) == "none yet"
    forward()
    assert "MiB; of their originals " in freezing.packed_weights(model)
    vk.freeze(model)
    assert "frozen by vk.freeze" in freezing.packed_weights(model)


def test_the_machine_is_told(monkeypatch):
    class Kernels:
        @staticmethod
        def why_not_tracked():
            return "a container forbids it"

    monkeypatch.setattr(extension, "load", lambda part="cpu": Kernels)
    assert freezing.how_writes_are_noticed().endswith("a container forbids it")
    monkeypatch.setattr(extension, "load", lambda part="cpu": None)
    assert "nothing is packed" in freezing.how_writes_are_noticed()


@torch.no_grad()
def test_unpatching_gives_everything_back():
    model, forward = ready()
    vk.freeze(model)
    forward()
    weights = list(model.parameters())
    vk.unpatch(model)
    assert cache.nbytes(weights) == 0 and cache.rules(weights) == {}
    assert not any(frozen.storage() in [w.untyped_storage() for w in weights]
                   for frozen in cache._frozen.values())  # fmt: skip


@torch.no_grad()
def test_calibrating_leaves_a_model_frozen():
    model, forward = ready("bert", "gelu")
    forward()
    vk.freeze(model)
    batches = [
        dict(zip(("input_ids", "attention_mask"), tiny.batch(*range(10, 34)), strict=True))
    ] * 3
    vk.calibrate(model, batches)
    assert set(cache.rules([w_in(model)])) == {"frozen"}
