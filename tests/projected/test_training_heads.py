"""Training projected models whose labels are no next tokens: the loss is the head's own."""

from __future__ import annotations

import pytest
import torch
import transformers

import variator_kernels as vk
from tests.projected.test_training import settings
from variator_kernels.train import ProjectionTrainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_labels": 3, "pad_token_id": 0}  # fmt: skip
HEADS = ("BertForSequenceClassification", "BertForMaskedLM", "BertForTokenClassification",
         "LlamaForSequenceClassification", "LlamaForTokenClassification",
         "LlamaForCausalLM")  # fmt: skip
A_ROW = "ForSequenceClassification"


def made(head: str):
    family = head.partition("For")[0]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL)
    model = getattr(transformers, head)(config).eval()
    return model, vk.project(model, [batch(head)], ffn=40, start="select")


def batch(head: str, rows: int = 4, length: int = 12):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (rows, length), generator=generator)
    if head.endswith(A_ROW):
        return {"input_ids": ids, "labels": torch.arange(rows) % 3}
    classes = 3 if head.endswith("TokenClassification") else 50
    labels = torch.randint(0, classes, ids.shape, generator=generator)
    labels[0, 3:7] = -100
    return {"input_ids": ids, "labels": labels}


def trainer(folder, small, head, teacher=None, given=None, **changes):
    given = given or batch(head)
    rows = [{name: value[i] for name, value in given.items()} for i in range(4)]
    args = settings(folder, learning_rate=1e-2, gradient_accumulation_steps=1, **changes)

    def collate(some):
        return {name: torch.stack([row[name] for row in some]) for name in some[0]}

    return ProjectionTrainer(small, args, rows, rows, teacher, data_collator=collate)


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_the_heads_own(tmp_path, head):
    model, small = made(head)
    changes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    found = trainer(tmp_path, small, head, **changes)
    own = small(**batch(head)).loss
    assert found.evaluate()["eval_loss"] == pytest.approx(own.item(), rel=1e-5)
    loss = found.compute_loss(small, batch(head))
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)
    taught = trainer(tmp_path, small, head, model, max_steps=12, **changes)
    before = taught.evaluate()
    assert before["eval_divergence"] > 0
    taught.train()
    assert taught.evaluate()["eval_loss"] < before["eval_loss"]
    assert all(p.requires_grad for p in model.parameters()), "the teacher is as it was"


def test_two_batches_of_one_step_are_one_mean(tmp_path):
    """Rows that have few labels count for as much as these."""
    head = "BertForMaskedLM"
    _, small = made(head)
    found = trainer(tmp_path, small, head, per_device_eval_batch_size=1)
    own = small(**batch(head)).loss
    assert found.evaluate()["eval_loss"] == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("head", "labels", "match"),
    [
        ("BertForSequenceClassification", torch.rand(4, 3), "labels must be integers, .*float32"),
        ("BertForSequenceClassification", torch.zeros(4, 12, dtype=torch.long),
         r"labels must be one for each distribution, \[4\], got \[4, 12\]"),
        ("BertForTokenClassification", torch.zeros(4, dtype=torch.long),
         r"labels must be one for each distribution, \[4, 12\], got \[4\]"),
        ("LlamaForCausalLM", torch.zeros(4, dtype=torch.long),
         r"labels must be one for each token, \[B, n\], got \[4\]"),
    ],
)  # fmt: skip
def test_labels_of_another_form(tmp_path, head, labels, match):
    _, small = made(head)
    given = {**batch(head), "labels": labels}
    found = trainer(tmp_path, small, head, given=given, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match=match):
        found.train()
