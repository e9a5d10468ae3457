"""Training projected models on transformers.Trainer."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers

import variator_kernels as vk
from tests.projected import cases
from tests.train import toy
from variator_kernels.methods.projected import composition, cost, groups, stored
from variator_kernels.train import ProjectionConfig, ProjectionTrainer
from variator_kernels.train.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def settings(folder, **changes):
    how = {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "report_to": [],
        "max_steps": 3, "warmup_steps": 0, "per_device_train_batch_size": 2, "save_steps": 100,
        "lr_scheduler_type": "constant", "learning_rate": 1e-2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    return ProjectionConfig(**how | changes)


def data(number: int = 24, length: int = 12):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (number, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def pair(**options):
    model = cases.model("llama").float()
    return model, cases.project(model, **options)


def trainer(folder, small, model=None, **changes):
    args = settings(folder, **changes)
    rows = data()
    return ProjectionTrainer(small, args, rows, rows[:8], model, data_collator=collate)


def test_loss_and_step_are_those_that_it_says(tmp_path):
    """Against a loop in plain PyTorch: one batch instead of two, W_C in autograd's own graph."""
    model, small = pair()
    twin = copy.deepcopy(small)
    made = trainer(tmp_path, small, model, max_grad_norm=0.3)
    order = [made.train_dataset[i] for i in range(12)]
    made.train()
    optimizer = torch.optim.AdamW(groups.parameter_groups(twin, 1e-2, 1 / 30), weight_decay=0.0)
    for step in range(3):
        batch = collate(order[4 * step : 4 * step + 4])
        labels = batch["labels"][:, 1:].flatten()
        ours, theirs = (
            m(batch["input_ids"]).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            for m in (twin, model)
        )
        apart = (theirs.exp() * (theirs - ours)).sum(-1).mean()
        (0.5 * F.nll_loss(ours, labels) + 0.5 * apart).backward()
        p = {id(q) for q in groups.projections(twin)}
        norm = torch.stack([q.grad.norm() for q in twin.parameters() if id(q) not in p]).norm()
        assert norm > 0.3
        for q in twin.parameters():
            q.grad *= 0.3 / norm
        optimizer.step()
        optimizer.zero_grad()
    for (name, got), expected in zip(small.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_rates_and_decays(tmp_path):
    _, small = pair(untie=False)
    made = trainer(tmp_path, small, projection_rate=0.1, projection_decay=0.2, weight_decay=0.3)
    optimizer = made.create_optimizer()
    found = [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert [group[:2] for group in found] == [(1e-3, 0.2), (1e-2, 0.3), (1e-2, 0.0)]
    assert sum(group[2] for group in found) == len(list(small.parameters()))
    names = dict(small.named_parameters())
    assert found[0][2] == sum("p_in" in name or "p_out" in name for name in names)


def test_built_once_a_step_and_evaluated_as_it_is(tmp_path, monkeypatch):
    built = []
    original = composition.compose
    monkeypatch.setattr(composition, "compose", lambda *a: built.append(1) or original(*a))
    model, small = pair()
    made = trainer(tmp_path, small, model, gradient_accumulation_steps=3, max_steps=4)
    built.clear()
    made.train()
    every = len(list(composition.composed(small)))
    assert 4 * every <= len(built) <= 5 * every  # the Trainer looks at weights before it begins
    metrics = made.evaluate()
    batch = collate(data()[:8])
    logits = cases.output(vk.merge(small), {"input_ids": batch["input_ids"]})[:, :-1]
    truth = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert metrics["eval_perplexity"] == pytest.approx(truth.exp().item(), rel=1e-4)
    assert {"eval_loss", "eval_perplexity", "eval_divergence"} <= set(metrics)


def test_goes_on_exactly_where_it_stopped(tmp_path):
    model, small = pair()
    start, kept = copy.deepcopy(small), {}
    for name in ("whole", "cut"):
        torch.manual_seed(0)
        made = trainer(tmp_path / name, copy.deepcopy(start), model, max_steps=6, save_steps=2)
        if name == "cut":
            shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
        made.train(resume_from_checkpoint=True)
        kept[name] = made.model.state_dict()
    assert made.state.global_step == 6
    for name, value in kept["whole"].items():
        assert torch.equal(value, kept["cut"][name]), name


def test_report_and_warning(tmp_path, caplog):
    _, small = pair()
    with caplog.at_level("WARNING", logger="variator_kernels"):
        found = trainer(tmp_path, small).report()
    total = sum(p.numel() for p in vk.merge(small).parameters())
    assert (found.small, found.trainable) == (total, sum(p.numel() for p in small.parameters()))
    assert f"{found.trainable:,} parameters are trained" in caplog.text
    assert found.share > cost.WARNED and "more than 20 % of a step" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="variator_kernels"):
        trainer(tmp_path, small, gradient_accumulation_steps=100).report()
    assert "more than 20 %" not in caplog.text
    part = next(m for _, m in composition.composed(small))
    linear = composition.composition_of(small.model.layers[0].mlp.up_proj)
    (f, d), (g, h) = linear.frozen.shape, small.model.layers[0].mlp.up_proj.weight.shape
    counted = cost._building(linear, torch.empty(g, h))
    left, right = g * f * d + g * d * h, f * d * h + g * f * h
    assert counted == min(left, right) + (f * d * h + g * h * f) + (g * f * d + d * g * h)
    assert part is not None


def test_frozen_weights_may_stay_on_the_cpu(tmp_path):
    _, small = pair()
    trainer(tmp_path, small, frozen_on_cpu=True)
    assert all(composition.composition_of(m).stays for _, m in composition.composed(small))


def test_refusals(tmp_path):
    model, small = pair()
    with pytest.raises(ValueError, match=r"model must be what vk\.project made"):
        trainer(tmp_path, vk.merge(small))
    whole = cases.project(model, 1.0)
    match = r"must have projections, got a LlamaForCausalLM in which nothing was reduced \(hidden "
    with pytest.raises(ValueError, match="model " + match):
        trainer(tmp_path, whole)
    with pytest.raises(ValueError, match="small " + match):
        stored.save(whole, tmp_path)
    assert not (tmp_path / stored.TENSORS).exists()
    with pytest.raises(ValueError, match=r"small must be what vk\.project made"):
        stored.save(vk.merge(small), tmp_path)
    with pytest.raises(ValueError, match="teacher_weight must be from 0 to 1, got 2"):
        settings(tmp_path, teacher_weight=2)
    with pytest.raises(ValueError, match="projection_rate must be a finite number > 0, got 0"):
        settings(tmp_path, projection_rate=0)
    with torch.no_grad():
        small.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss of step 0 is not finite"):
        trainer(tmp_path, small, model).train()
    with pytest.raises(FloatingPointError, match="nothing was written"):
        trainer(tmp_path, small, model).save_model()


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_one_command(tmp_path, kind):
    getattr(toy, kind)(tmp_path / "model")
    toy.plain_text(tmp_path / "text.txt", 100)
    text, output = str(tmp_path / "text.txt"), tmp_path / "out"
    words = ["project", "--model", str(tmp_path / "model"), "--data", text, "--output", str(output)]
    words += ["--params", "0.7", "--calibrate", "8", "--eval-data", text, "--max-length", "24"]
    words += ["--max_steps", "6", "--save_steps", "2", "--eval_steps", "3", "--use_cpu"]
    words += ["--learning_rate", "0.01", "--warmup_steps", "0", "--disable_tqdm", "true"]
    main(words)
    metrics = json.loads((output / "metrics.json").read_text())
    head = "LlamaForCausalLM" if kind == "llama" else "T5ForConditionalGeneration"
    merged = getattr(transformers, head).from_pretrained(output / "merged")
    assert {"eval_loss", "eval_perplexity", "eval_divergence"} <= set(metrics)
    before = {n: p.clone() for n, p in merged.named_parameters()}
    for name in ("metrics.json", "merged", "checkpoint-6"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    main(words)  # from checkpoint-4
    merged = getattr(transformers, head).from_pretrained(output / "merged")
    for name, value in merged.named_parameters():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match=r"holds a run with params=0\.7, now it is 0\.5"):
        main([word if word != "0.7" else "0.5" for word in words])
