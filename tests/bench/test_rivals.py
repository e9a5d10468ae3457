"""bench.rivals: what each does to a BERT, and that it changes nothing where it must not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import variator_kernels as vk
from bench.rivals import bert, layers, token_merging, token_pruning, width
from tests.train import toy

LENGTHS = (9, 1, 14, 5, 2)
SIZES = torch.arange(max(LENGTHS))
MASK = (torch.tensor(LENGTHS)[:, None] > SIZES).long()


@pytest.fixture
def model(tmp_path: Any) -> Any:
    folder = toy.bert(tmp_path / "model", spread=0.4)
    return BertForSequenceClassification.from_pretrained(folder).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 60, MASK.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids * MASK, "attention_mask": MASK}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def opened(model: Any) -> Any:
    found = token_pruning.learned(model, 1.0)
    for block in found.blocks:
        block.threshold.data.fill_(-1.0)
    return found


NEUTRAL = {
    "blocks": lambda model, batch: bert.Classifier(model, bert.Block),
    "fixed": lambda model, batch: token_pruning.fixed(model, 1.0),
    "learned": lambda model, batch: opened(model),
    "merging": lambda model, batch: token_merging.merging(model, 0.0),
    "layers": lambda model, batch: layers.drop(model, 2, True),
    "width": lambda model, batch: width.prune(model, 1.0, [batch]),
}
CHANGES = {
    "fixed": lambda model: token_pruning.fixed(model, 0.4),
    "learned": lambda model: token_pruning.learned(model, 0.4),
    "merging": lambda model: token_merging.merging(model, 0.3),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_changes_nothing_where_it_must_not(name, model, batch):
    expected = logits(model.double(), batch)
    made = NEUTRAL[name](copy.deepcopy(model), batch)
    assert torch.allclose(logits(made, batch), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CHANGES)
def test_a_row_depends_on_itself_alone_and_packed_weights_change_nothing(name, model, batch):
    made = CHANGES[name](model)
    if name == "learned":
        for block in made.blocks:
            block.threshold.data.fill_(0.07)
    exact = logits(copy.deepcopy(made).double(), batch)
    assert (exact - logits(copy.deepcopy(made.model).double(), batch)).abs().max() > 1e-3
    assert torch.allclose(logits(made, batch).double(), exact, atol=1e-4)
    for row, length in enumerate(LENGTHS):
        alone = {key: value[row : row + 1, :length] for key, value in batch.items()}
        assert torch.allclose(logits(made, alone).double(), exact[row], atol=1e-4)


@pytest.mark.parametrize("name", CHANGES)
def test_everything_gets_a_gradient(name, model, batch):
    made = CHANGES[name](model)
    out = made(**batch, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    (out.logits.sum() + (0 if out.loss is None else out.loss)).backward()
    without = {n for n, p in made.named_parameters() if p.grad is None}
    assert not without
    assert all(bool(p.grad.isfinite().all()) for p in made.parameters())


def test_pruning_keeps_the_first_token_and_the_best():
    scores = torch.tensor([[0.0, 0.3, 0.1, 0.4, 0.9], [0.0, 0.2, 0.1, 0.0, 0.0]])
    real = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    found = token_pruning.largest(scores, real, 0.5)
    assert found.tolist() == [0, 3, 5, 6]  # 2 of 4, and 1.5 of 3 rounded up
    assert token_pruning.largest(scores, real, 0.25).tolist() == [0, 5]


def test_scores_are_the_attention_that_a_token_gets(model):
    block = token_pruning.Fixed(model.bert.encoder.layer[0], 0.5)
    q, k, v = torch.randn(3, 2, 2, 5, 8).unbind()
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    out, scores = block.attend(q, k, v, real[:, None, None], real)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, real[:, None, None])
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(scores.sum(-1), torch.ones(2))
    assert not scores[1, 3:].any()


def test_thresholds_learn_a_share_and_are_held_then(model, batch):
    made = token_pruning.learned(model, 0.3)
    rate, first = 1e-2, made.blocks[0].threshold
    optimizer = torch.optim.Adam([{**g, "lr": rate} for g in made.parameter_groups(rate)[1:]])
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = made(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.6 and losses[-1] < 0.25  # first tokens of short rows are 0.16 of all
    copy.deepcopy(made)
    made.progress = 1.0
    out = made(**batch)
    assert out.loss is None
    first.grad = None
    out.logits.sum().backward()
    assert first.grad is None


def test_merging_keeps_order_sums_and_the_first_token():
    x = torch.randn(2, 7, 4)
    x[0, 3] = x[0, 4]  # the most similar pair of the first row
    real = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]]).bool()
    found = token_merging.merge(bert.Tokens(x, real), x, 1 / 7)
    assert found.real.sum(-1).tolist() == [6, 3]
    assert torch.equal(found.x[0], x[0, [0, 1, 2, 4, 5, 6]])
    assert found.size[0].tolist() == [1, 1, 1, 2, 1, 1]
    more = token_merging.merge(found, found.x, 0.4)
    assert torch.equal(more.x[:, 0], x[:, 0])
    assert (more.size * more.real).sum(-1).tolist() == [7, 3]
    total = (more.x * (more.size * more.real)[..., None]).sum(1)
    assert torch.allclose(total, (x * real[..., None]).sum(1), atol=1e-5)


def test_layers(model):
    weights = [layer.output.dense.weight for layer in model.bert.encoder.layer]
    low = layers.drop(copy.deepcopy(model), 1)
    high = layers.drop(copy.deepcopy(model), 1, spread=True)
    for made, kept in ((low, 0), (high, 1)):
        (layer,) = made.bert.encoder.layer
        assert torch.equal(layer.output.dense.weight, weights[kept])
        assert made.matched == (0, kept + 1)
    with pytest.raises(ValueError, match="keep must be from 1 to 2, got 3"):
        layers.drop(model, 3)


def test_width_keeps_the_neurons_that_matter(model, batch):
    for layer in model.bert.encoder.layer:
        first = layer.intermediate.dense  # half of the neurons do nothing
        for part in (first.weight, first.bias, layer.output.dense.weight.T):
            part.data[::2] = 0
    expected = logits(model, batch)
    made = width.prune(copy.deepcopy(model), 0.5, [batch])
    assert made.bert.encoder.layer[0].intermediate.dense.weight.shape == (16, 16)
    assert torch.allclose(logits(made, batch), expected, atol=1e-5)
    chosen = vk.merge(vk.project(model, [batch], ffn=16, start="select", importance="weight"))
    assert torch.allclose(logits(chosen, batch), expected, atol=1e-5)


def test_multiply_adds_are_those_of_the_package(model, batch):
    made = bert.Classifier(model, bert.Block)
    logits(made, batch)
    count = vk.flops.count(model.bert, length=LENGTHS, ratio=1).multiply_adds
    assert made.multiply_adds() == count.total - count.other
    few = token_pruning.fixed(model, 0.5)
    logits(few, batch)
    ffn = sum(-(-n // 2) for n in LENGTHS) * 2 * 16 * 32 * 2
    assert few.multiply_adds() == count.total - count.other - count.ffn + ffn
    merged = token_merging.merging(model, 0.3)
    logits(merged, batch)
    assert merged.multiply_adds() < made.multiply_adds()


def test_refuses_other_models(tmp_path):
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(toy.llama(tmp_path / "llama"))
    with pytest.raises(ValueError, match="model must be a bert, got a llama"):
        token_pruning.fixed(llama, 0.5)
