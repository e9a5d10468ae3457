"""Training steps on packed weights: the base model's products, and nothing that is trained."""

from __future__ import annotations

import pytest
import torch

import variator_kernels as vk
from tests.ops.cases import needs_cpu
from tests.sites import tiny
from tests.train.test_trainer import plugins, trainer
from variator_kernels.ops import prepack, prepacked_linear, rows_linear

pytestmark = [needs_cpu, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture
def products(monkeypatch):
    """Every weight that ran packed; tiny models have only small ones."""
    monkeypatch.setattr(prepacked_linear, "LEAST", 1)
    found = []
    for name in ("linear", "transposed"):
        plain = getattr(prepack, name)

        def noted(weight, *rest, name=name, plain=plain, **more):
            found.append((name, weight))
            return plain(weight, *rest, **more)

        monkeypatch.setattr(prepack, name, noted)
    own = rows_linear.stacked

    def stacked(weights, *rest):
        found.extend(("rows", weight) for weight in weights)
        return own(weights, *rest)

    monkeypatch.setattr(rows_linear, "stacked", stacked)
    return found


def trained(folder, backend, **settings):
    model = tiny.patched(head="EncoderModel", dropout=0.0, backend=backend)
    made = trainer(folder, model, save_strategy="no", **settings)
    made.train()
    return made.model


def test_a_run_ends_as_without_them(tmp_path, products):
    theirs = trained(tmp_path / "a", "reference")
    assert not products
    ours = trained(tmp_path / "b", "cpu")
    assert {name for name, _ in products} == {"linear", "transposed"}
    known = {id(weight) for weight in ours.parameters() if not weight.requires_grad}
    assert all(id(weight) in known for _, weight in products)
    for a, b in zip(plugins(theirs), plugins(ours), strict=True):
        # Six steps of Adam, whose first ones have the size of the rate whatever the gradient's is.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("late", [False, True])
def test_gradient_checkpointing_runs_on_them_again(tmp_path, products, late):
    """What the backward pass computes again is what the forward pass computed."""
    ends = []
    for checkpointing in (False, True):
        model = tiny.patched(head="EncoderModel", dropout=0.0, backend="cpu")
        early = checkpointing and not late
        made = trainer(
            tmp_path / str(checkpointing),
            model,
            dropout=True,
            gradient_checkpointing=early,
            save_strategy="no",
        )
        if checkpointing and late:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        made.train()
        ends.append([*plugins(model)])
        assert products
        products.clear()
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_they_can_be_done_without(tmp_path, products):
    trained(tmp_path, "cpu", packed_products=False)
    assert not products


def test_packed_weights_are_freed_after_a_run(tmp_path, products):
    other = tiny.patched(head="EncoderModel", backend="cpu")
    ids, mask = tiny.batch(4, 9)
    with torch.no_grad():
        other(ids, attention_mask=mask)
    kept = prepack.cache.nbytes(other.parameters())
    model = trained(tmp_path, "cpu")
    assert products and prepack.cache.nbytes(model.parameters()) == 0
    assert prepack.cache.nbytes(other.parameters()) == kept > 0
    with torch.no_grad(), vk.use_ratio(model, 4):
        model(ids, attention_mask=mask)


def test_the_head_of_a_language_model_is_not_packed(tmp_path, products):
    model = tiny.patched(backend="cpu")
    made = trainer(tmp_path, model, save_strategy="no")
    inputs = dict(zip(("input_ids", "attention_mask"), tiny.batch(4, 9), strict=True))
    labels = torch.tensor([[5, 1], [6, 1]])
    with made._products():
        made.compute_loss(model, {**inputs, "labels": labels, "decoder_input_ids": labels})
    packed = {id(weight) for _, weight in products}
    assert packed and id(model.lm_head.weight) not in packed


def test_an_evaluation_runs_the_model_as_it_is(tmp_path, products):
    """Its FFNs alone, compressed, run packed: as at any inference."""
    model = tiny.patched(head="EncoderModel", backend="cpu")
    trainer(tmp_path, model).evaluate()
    packed = {id(weight) for _, weight in products}
    attention = {id(w) for name, w in model.named_parameters() if "SelfAttention" in name}
    assert packed and attention and not packed & attention
