"""Distances of next-token distributions, a chunk of positions at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.decoders import tiny
from variator_kernels.train import next_tokens
from variator_kernels.train.losses import IGNORED

SETTINGS = {"llama": {}, "gemma2": {"final_logit_softcapping": 2.0}}


def made(family="llama", seed=0):
    model = tiny.model(family, **SETTINGS[family])
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 7, tiny.D, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(3, tiny.VOCABULARY, (3, 7), generator=generator)
    labels[torch.rand(3, 7, generator=generator) < 0.3] = IGNORED
    return model, hidden, labels


def plain(model, student, teacher, labels, logits_weight, task_weight):
    """With whole arrays, by the model's own means."""

    def logits(hidden):
        out = model.lm_head(hidden[:, :-1])
        cap = getattr(model.config, "final_logit_softcapping", None)
        return (out if cap is None else cap * torch.tanh(out / cap)).float()

    counted = labels[:, 1:] != IGNORED
    ours, theirs = (logits(h).log_softmax(-1)[counted] for h in (student, teacher))
    unlikely = F.nll_loss(ours, labels[:, 1:][counted], reduction="sum")
    apart = (theirs.exp() * (theirs - ours)).sum()
    return logits_weight * apart + task_weight * unlikely


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 2.0), (0.5, 3.0)])
@pytest.mark.parametrize("chunk", [1, 5 * 4 * tiny.VOCABULARY, 1 << 25])
def test_is_the_plain_sum_and_so_is_its_gradient(monkeypatch, family, weights, chunk):
    monkeypatch.setattr(next_tokens, "CHUNK", chunk)
    model, student, labels = made(family)
    teacher = made(family, seed=1)[1]
    batch = {"labels": labels}
    head = next_tokens.Head(model.requires_grad_(False))
    found = []
    for run in ("chunks", "plain"):
        leaf = student.clone().requires_grad_()
        if run == "plain":
            loss = plain(model, leaf, teacher, labels, *weights)
        else:
            pair = (next_tokens.predictions(h, batch) for h in (leaf, teacher))
            loss = next_tokens.loss(head, *pair, next_tokens.targets(batch), *weights)
        (2 * loss).backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 1 << 25])
def test_per_token(monkeypatch, chunk):
    monkeypatch.setattr(next_tokens, "CHUNK", chunk)
    model, student, labels = made()
    teacher, batch = made(seed=1)[1], {"labels": labels}
    head = next_tokens.Head(model)
    pair = [next_tokens.predictions(h, batch) for h in (student, teacher)]
    apart, unlikely = next_tokens.per_token(head, *pair, next_tokens.targets(batch))
    for weights, got in (((1.0, 0.0), apart), ((0.0, 1.0), unlikely)):
        expected = plain(model, student, teacher, labels, *weights)
        torch.testing.assert_close(got.sum(), expected.detach())
    alone = next_tokens.per_token(head, pair[0], None, next_tokens.targets(batch))
    assert not alone[0].any() and torch.equal(alone[1], unlikely)


def test_nothing_to_predict():
    model, student, labels = made()
    batch = {"labels": torch.full_like(labels, IGNORED)}
    head = next_tokens.Head(model.requires_grad_(False))
    leaf = student.clone().requires_grad_()
    ours = next_tokens.predictions(leaf, batch)
    loss = next_tokens.loss(head, ours, ours.detach(), next_tokens.targets(batch), 1.0, 1.0)
    loss.backward()
    assert loss == 0 and not leaf.grad.any()
    found = next_tokens.per_token(head, ours, ours, next_tokens.targets(batch))
    assert [len(part) for part in found] == [0, 0]


def test_never_holds_logits_of_all(monkeypatch):
    """The largest array that is made has a chunk's size."""
    monkeypatch.setattr(next_tokens, "CHUNK", 2 * 4 * tiny.VOCABULARY)
    model, student, labels = made()
    batch, rows = {"labels": labels}, []

    class Noted(nn.Module):
        weight = model.lm_head.weight.detach()

        def forward(self, hidden):
            rows.append(len(hidden))
            return hidden @ self.weight.T

    head = next_tokens.Head(model)
    head.layer = Noted()
    ours = next_tokens.predictions(student.clone().requires_grad_(), batch)
    next_tokens.loss(head, ours, ours.detach(), next_tokens.targets(batch), 1.0, 0.0).backward()
    assert max(rows) == 2


def test_a_head_of_another_kind_is_found_out():
    model = tiny.model(dtype=torch.float32)
    next_tokens.check_head(model, next_tokens.Head(model))
    model.lm_head.register_forward_hook(lambda module, given, out: out + 1)
    next_tokens.check_head(model, next_tokens.Head(model))  # its own hooks run
    plain = next_tokens.Head(model)

    def doubled(module, given, out):
        out.logits = out.logits * 2

    model.register_forward_hook(doubled)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM must make its logits .* by its output"):
        next_tokens.check_head(model, plain)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_such_a_head(family):
    model = tiny.model(family, dtype=torch.float32)
    next_tokens.check_head(model, next_tokens.Head(model))
