"""precision="int8" from patching to unpatching: training, copies, graphs, files, refusals."""

from __future__ import annotations

import copy

import pytest
import torch

import variator_kernels as vk
from tests.sites import int8_cases, tiny
from tests.sites.int8_cases import (
    DECODERS,
    FAMILIES,
    FFN_ALONE,
    forward,
    pair,
    plain,
    ready,
    small_layers,  # noqa: F401 - a fixture
    swapped,
)
from variator_kernels.ops.int8_linear import kernels
from variator_kernels.ops.packed import cache
from variator_kernels.sites.find import find
from variator_kernels.sites.install import patched_sublayers

pytestmark = int8_cases.marks


@pytest.mark.parametrize("name", FAMILIES + DECODERS)
@torch.no_grad()
def test_unpatch_brings_everything_back(name):
    original = plain(name)
    model = copy.deepcopy(original)
    places = ("ffn",) if name in FFN_ALONE else ("ffn", "attention_kv")
    int8_cases.patch(model, 2, (2,), placements=places, precision="int8")
    assert swapped(model)
    batch = tiny.batch(19, 7, 12)
    forward(model, *batch)
    vk.unpatch(model)
    assert tiny.snapshot(model) == tiny.snapshot(original)
    assert torch.equal(forward(model, *batch), forward(original, *batch))


def test_training_is_that_of_the_model_itself():
    """Outputs and gradients are equal bit by bit, whatever the mode."""
    model, exact, batch = ready("t5")
    for training in (True, False):
        for made in (model, exact):
            made.train(training)
            made.zero_grad()
            torch.manual_seed(0)
            forward(made, *batch).square().sum().backward()
        pairs = zip(vk.plugin_parameters(model), vk.plugin_parameters(exact), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    for made in (model, exact):
        made.train()
    with torch.no_grad():
        for level in (None, 1):
            for made in (model, exact):
                if level is not None:
                    vk.set_ratio(made, level)
            outputs = []
            for made in (model, exact):
                torch.manual_seed(0)
                outputs.append(forward(made, *batch))
            assert torch.equal(*outputs)


def test_gradient_checkpointing_sees_one_precision():
    model, exact, batch = ready("bert")
    for made in (model, exact):
        made.train()
        made.gradient_checkpointing_enable({"use_reentrant": True})
        made.enable_input_require_grads()
        torch.manual_seed(0)
        forward(made, *batch).square().sum().backward()
    pairs = zip(vk.plugin_parameters(model), vk.plugin_parameters(exact), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs if a.grad is not None)


def test_calibration_is_that_of_the_model_itself():
    found = []
    for made in ready("bert")[:2]:
        ids, mask = tiny.batch(*range(9, 21))
        vk.calibrate(made, [{"input_ids": ids, "attention_mask": mask}], passes=1)
        found.append([p.detach().clone() for p in vk.plugin_parameters(made)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_plugin_files_do_not_hold_it(tmp_path):
    model, exact, batch = ready("bert")
    for made, folder in ((model, "int8"), (exact, "own")):
        vk.save_plugins(made, tmp_path / folder)
    for name in ("plugins.json", "plugins.safetensors"):
        files = [(tmp_path / folder / name).read_bytes() for folder in ("int8", "own")]
        assert files[0] == files[1]
    fresh = vk.load_plugins(other := plain("bert"), tmp_path / "int8")
    assert fresh is None and not swapped(other)
    assert torch.equal(forward(other, *batch), forward(exact, *batch))
    before = forward(model, *batch)
    vk.load_plugins(model, tmp_path / "own")  # a patched model keeps its own
    assert torch.equal(forward(model, *batch), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int4"}, r"precision must be None or one of \('int8',\), got 'int4'"),
        ({"precision": 8}, "precision must be None or one of"),
        ({"precision": "int8", "pack": False}, "pack must be True with precision='int8'"),
        (
            {"precision": "int8", "backend": "reference"},
            "backend must be 'auto' or 'cpu' with precision='int8'.*got 'reference'",
        ),
    ],
)
@pytest.mark.parametrize("patch", [vk.patch, vk.patch_bert])
def test_refusals(patch, settings, message):
    model = plain("bert")
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        patch(model, 2, **settings)
    assert tiny.snapshot(model) == before


def test_every_patch_function_takes_it():
    for patch, name in ((vk.patch_t5, "t5"), (vk.patch_bert, "bert"), (vk.patch_llama, "llama")):
        assert swapped(patch(plain(name), 2, precision="int8"))


@torch.no_grad()
def test_where_nothing_multiplies_in_int8(monkeypatch):
    """The model's own dtype stays, and describe says so."""
    with monkeypatch.context() as patched:
        kernels._choice.cache_clear()
        patched.setattr(kernels, "is_exact", lambda _: False)
        model, exact, batch = ready("bert")
        assert torch.equal(forward(model, *batch), forward(exact, *batch))
        assert "float32: int8 products are none" in vk.describe(model)
    kernels._choice.cache_clear()
    assert "int8 in eval() with gradients disabled" in vk.describe(model)


@torch.no_grad()
def test_layers_that_are_no_plain_ones_stay():
    """A hooked layer, and one of a class of somebody's own, are what they were."""
    model = plain("bert")

    class Own(torch.nn.Linear):
        pass

    first, second = find(model).layers
    first.intermediate.dense.__class__ = Own
    second.output.dense.register_forward_hook(lambda *_: None)
    vk.patch(model, 2, (2,), precision="int8")
    kinds = {type(first.intermediate.dense), type(second.output.dense)}
    assert kinds == {Own, torch.nn.Linear}
    assert len(swapped(model)) == 2
    forward(model, *tiny.batch(19, 7))
    vk.unpatch(model)
    assert type(find(model).layers[0].intermediate.dense) is Own


@torch.no_grad()
def test_freeze_knows_every_copy():
    model, _ = pair("modernbert", {"ffn": 2})  # both products of whose gate are one matrix
    batch = tiny.batch(19, 7, 12)
    vk.freeze(model)
    for level in (2, 1):
        vk.set_ratio(model, level)
        before = forward(model, *batch)
    layer = find(model).layers[0]
    both = layer.Wi.weight
    assert cache.rules([both]) == {"frozen": both.nbytes}
    both.data.mul_(2)  # against the promise: nobody looks
    assert torch.equal(forward(model, *batch), before)
    vk.thaw(model)
    assert not torch.equal(forward(model, *batch), before)


@torch.no_grad()
def test_shared_layers():
    model, _, batch = ready("albert")
    assert len(patched_sublayers(model)) < len(find(model).layers)
    assert torch.equal(forward(model, *batch), forward(copy.deepcopy(model), *batch))


def test_evaluation_of_a_training_run_is_in_the_models_own_dtype(tmp_path):
    from variator_kernels.train import DistillationConfig, DistillationTrainer

    def loss(precision):
        model = vk.patch(plain("bert"), 2, (2,), 6, precision=precision)
        tiny.train_plugins(model)
        ids, mask = tiny.batch(19, 7, 12)
        rows = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
        args = DistillationConfig(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
        return DistillationTrainer(model, args, rows, rows).evaluate()["eval_loss"]

    assert loss("int8") == pytest.approx(loss(None), rel=1e-6)


@torch.no_grad()
def test_fused_matrices_are_given_back():
    model, _ = pair("modernbert", {"ffn": 2})
    batch = tiny.batch(19, 7, 12)
    weights = list(plain_parameters(model))
    forward(model, *batch)
    vk.freeze(model)
    forward(model, *batch)
    vk.unpatch(model)
    assert cache.nbytes(weights) == 0 and not cache.rules(weights).get("frozen")
    vk.patch(model, 2, (2,), 6, precision="int8")
    before = forward(model, *batch)
    model.layers[0].mlp.Wi.weight.data.mul_(3)
    assert not torch.equal(forward(model, *batch), before)


def plain_parameters(model):
    return (p for name, p in model.named_parameters() if "plugins" not in name)
