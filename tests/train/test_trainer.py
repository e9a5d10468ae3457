"""DistillationTrainer: what it trains, what it keeps, what it reports."""

import copy

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.train import (
    DistillationConfig,
    DistillationTrainer,
    ProjectionConfig,
    checkpoints,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
ROWS = [
    {"input_ids": ids[mask != 0].tolist()}
    for ids, mask in zip(*tiny.batch(9, 4, 6, 11, 7, 3, 5, 8), strict=True)
]


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def trainer(folder, model=None, **settings):
    model = model or tiny.patched(head="EncoderModel", dropout=0.1)
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "warmup_steps": 0} | settings
    config = DistillationConfig(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_steps=2, **settings
    )
    return DistillationTrainer(
        model, config, train_dataset=ROWS, eval_dataset=ROWS, data_collator=collate
    )


def plugins(model, *ratios):
    return [p.detach().clone() for p in vk.plugin_parameters(model, ratios or None)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_trains_the_active_ratio_alone(tmp_path):
    made = trainer(tmp_path)
    model = made.model
    before = copy.deepcopy(model)
    loss = made.evaluate()["eval_k4_loss"]
    made.train()
    assert same(plugins(model, 2), plugins(before, 2))
    changed = zip(plugins(model, 4), plugins(before, 4), strict=True)
    assert all(not torch.equal(a, b) for a, b in changed)
    base = dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        trained = ".plugins.4." in name
        assert parameter.requires_grad == trained
        assert trained or torch.equal(parameter, base[name])
    assert made.evaluate()["eval_k4_loss"] < loss


def test_deals_every_ratio_the_same_number_of_steps(tmp_path):
    model = tiny.patched(head="EncoderModel", ratios=(2, 3, 4, 8))
    made = trainer(tmp_path, model, sample_ratios=True, max_steps=8)
    dealt = [ratio for step in range(400) for ratio in made.turns.at(step)]
    for turn in range(0, 400, 4):
        assert sorted(dealt[turn : turn + 4]) == [2, 3, 4, 8]
    assert len(set(tuple(dealt[i : i + 4]) for i in range(0, 400, 4))) > 5
    before = copy.deepcopy(model)
    made.train()
    for ratio in (2, 3, 4, 8):
        assert not same(plugins(model, ratio), plugins(before, ratio))
    assert set(made.evaluate()) >= {f"eval_k{k}_loss" for k in (2, 3, 4, 8)}


def test_ratios_that_share_a_step_get_the_gradients_that_each_would_get_alone(
    tmp_path, monkeypatch
):
    model = tiny.patched(head="EncoderModel", ratios=(2, 3, 4, 8), dropout=0.0)
    shared = trainer(tmp_path, model, sample_ratios=True, ratios_per_step=2)
    turns = [shared.turns.at(step) for step in range(20)]
    for first, second in zip(turns[::2], turns[1::2], strict=True):
        assert sorted(first + second) == [2, 3, 4, 8]
    batch, together = collate(ROWS[:4]), shared.turns.at(0)
    loss = shared.compute_loss(model, batch)
    loss.backward()
    rest = set(shared.ratios) - set(together)
    assert all(p.grad is None for p in vk.plugin_parameters(model, rest))
    got = [p.grad.clone() for k in together for p in vk.plugin_parameters(model, (k,))]
    losses, expected = [], []
    for k in together:
        model.zero_grad()
        vk.set_ratio(model, k)
        losses.append(trainer(tmp_path, model).compute_loss(model, batch))
        losses[-1].backward()
        expected += [p.grad.clone() for p in vk.plugin_parameters(model, (k,))]
    torch.testing.assert_close(loss, sum(losses))
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="ratios_per_step must divide the number of ratios, got 3"):
        trainer(tmp_path, model, sample_ratios=True, ratios_per_step=3)
    with pytest.raises(ValueError, match="ratios_per_step must be >= 1, got 0"):
        trainer(tmp_path, model, ratios_per_step=0)
    monkeypatch.setattr(DistillationConfig, "world_size", 2)
    with pytest.raises(ValueError, match="must be 1 or the number of ratios in several processes"):
        trainer(tmp_path, model, sample_ratios=True, ratios_per_step=2)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_gradient_is_that_of_the_mean_squared_error(tmp_path, dropout):
    made = trainer(tmp_path, dropout=dropout, learning_rate=0.0)
    batch = collate(ROWS[:4])
    torch.manual_seed(5)
    loss = made.compute_loss(made.model.train(), batch)
    loss.backward()
    got = [p.grad for p in vk.plugin_parameters(made.model, (4,))]

    plain = tiny.patched(head="EncoderModel", dropout=0.1)
    with torch.no_grad(), vk.use_ratio(plain, 1):
        target = plain(**batch).last_hidden_state
    torch.manual_seed(5)
    out = plain.train(dropout)(**batch).last_hidden_state
    real = batch["attention_mask"] != 0
    expected = torch.nn.functional.mse_loss(out[real], target[real])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for g, parameter in zip(got, vk.plugin_parameters(plain, (4,)), strict=True):
        torch.testing.assert_close(g, parameter.grad, atol=1e-7, rtol=1e-4)


def test_accumulated_batches_give_what_one_gives(tmp_path):
    models = []
    for rows, accumulated in ((4, 1), (1, 4)):
        made = trainer(
            tmp_path / str(rows),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.1,
        )
        made.train()
        models.append(made.model)
    for a, b in zip(*map(plugins, models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("stop", [2, 4])
def test_resuming_ends_bit_for_bit_alike(tmp_path, stop):
    settings = {"sample_ratios": True, "dropout": True, "learning_rate": 1e-2}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train(resume_from_checkpoint=True)
    cut = trainer(tmp_path / "cut", **settings)
    cut.train()
    for path in (tmp_path / "cut").glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > stop:
            (path / checkpoints.COMPLETE).unlink()
    again = trainer(tmp_path / "cut", **settings)
    steps = []
    step = again.training_step
    again.training_step = lambda *args, **kwargs: (
        steps.append(again.state.global_step) or step(*args, **kwargs)
    )
    again.train(resume_from_checkpoint=True)
    assert steps == list(range(4 if stop == 4 else 0, 6)), "two checkpoints are kept: 4 and 6"
    assert same(plugins(whole.model), plugins(again.model))


def test_a_checkpoint_that_was_not_finished_is_not_used(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    real = type(made)._save_optimizer_and_scheduler

    def killed(self, folder):
        if folder.endswith("-4"):
            raise KeyboardInterrupt
        real(self, folder)

    monkeypatch.setattr(type(made), "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert (tmp_path / "checkpoint-4" / "plugins.safetensors").is_file()
    assert checkpoints.last(tmp_path) == tmp_path / "checkpoint-2"
    monkeypatch.undo()
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path):
    made = trainer(tmp_path, max_steps=8)
    step = made.training_step

    def poisoned(*args, **kwargs):
        if made.state.global_step == 5:
            with torch.no_grad():
                made.model.encoder.block[0].layer[0].SelfAttention.q.weight.fill_(float("nan"))
        return step(*args, **kwargs)

    made.training_step = poisoned
    with pytest.raises(FloatingPointError, match=r"step 5 \(ratio 4\) is nan; .*checkpoint-4: low"):
        made.train()
    assert all(torch.isfinite(p).all() for p in plugins(made.model))
    again = tiny.patched(head="EncoderModel", dropout=0.1)
    vk.load_plugins(again, tmp_path / "checkpoint-4")
    assert not same(plugins(again, 4), plugins(tiny.patched(head="EncoderModel"), 4))


def test_evaluates_means_over_tokens_and_rows(tmp_path):
    made = trainer(tmp_path, per_device_eval_batch_size=3)
    made.correct = lambda outputs, batch: outputs.last_hidden_state[:, 0, 0] > 0
    got = made.evaluate()
    model, batch = made.model.eval(), collate(ROWS)
    with torch.no_grad():
        with vk.use_ratio(model, 1):
            teacher = model(**batch).last_hidden_state
        student = model(**batch).last_hidden_state
    real = batch["attention_mask"] != 0
    error = torch.nn.functional.mse_loss(student[real], teacher[real]).item()
    assert got["eval_k4_loss"] == got["eval_loss"] == pytest.approx(error, rel=1e-5)
    right = (teacher[:, 0, 0] > 0).double().mean().item()
    assert got["eval_dense_accuracy"] == pytest.approx(right)


def test_refuses_what_it_cannot_train(tmp_path):
    with pytest.raises(ValueError, match="not patched"):
        trainer(tmp_path, tiny.model())
    dense = tiny.patched()
    vk.set_ratio(dense, 1)
    with pytest.raises(ValueError, match=r"at some site, got 1 \(dense\)"):
        trainer(tmp_path, dense)
    with pytest.raises(ValueError, match="set dropout=True"):
        trainer(tmp_path, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="layer_weight must be a finite number >= 0, got -1"):
        trainer(tmp_path, layer_weight=-1)
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        trainer(tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("config", [DistillationConfig, ProjectionConfig])
def test_without_accelerate_this_packages_extra_is_named(monkeypatch, tmp_path, config):
    monkeypatch.setattr("variator_kernels.train.config.is_accelerate_available", lambda: False)
    with pytest.raises(ImportError, match=r"variator-kernels\[train\]"):
        config(output_dir=str(tmp_path), use_cpu=True, report_to="none")


def test_rows_without_labels_are_refused_where_they_count(tmp_path):
    for name in ("logits_weight", "task_weight"):
        with pytest.raises(ValueError, match="must have labels where task_weight or logits_weight"):
            trainer(tmp_path / name, **{name: 1.0}).train()


def test_unpatched_after_mixed_precision_it_is_the_original(tmp_path):
    original = tiny.model("bert", "gelu")
    made = trainer(tmp_path, vk.patch(copy.deepcopy(original)), bf16=True, max_steps=1)
    made.train()
    with torch.no_grad():
        expected = tiny.encode(original, *tiny.batch(9, 4))
        assert torch.equal(tiny.encode(vk.unpatch(made.model), *tiny.batch(9, 4)), expected)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    made = []
    for saving in (False, True):
        settings = {"gradient_checkpointing": saving, "dropout": True}
        model = tiny.patched(head="EncoderModel", dropout=0.0)
        made.append(trainer(tmp_path / str(saving), model, **settings))
        made[-1].train()
    for a, b in zip(*(plugins(m.model) for m in made), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_an_epoch_is_a_pass_over_the_rows(tmp_path):
    made = trainer(tmp_path, tiny.patched(head="EncoderModel"), max_steps=6, logging_steps=3)
    made.train()
    passes = 6 * made.args.per_device_train_batch_size / len(ROWS)
    found = [entry["epoch"] for entry in made.state.log_history if "loss" in entry]
    assert found == pytest.approx([passes / 2, passes])
    assert made.state.log_history[-1]["epoch"] == pytest.approx(passes)


def test_kept_tokens_are_trained_with_saved_and_resumed(tmp_path):
    kept = {"keep_first": 1, "keep": (5,)}
    whole = trainer(tmp_path / "whole", tiny.patched(head="EncoderModel", **kept))
    whole.train()
    plain = trainer(tmp_path / "plain", tiny.patched(head="EncoderModel"))
    plain.train()
    assert not same(plugins(whole.model), plugins(plain.model))
    (tmp_path / "whole" / "checkpoint-6" / checkpoints.COMPLETE).unlink()
    again = trainer(tmp_path / "whole", tiny.patched(head="EncoderModel"))
    again.train(resume_from_checkpoint=True)
    assert again.model.encoder.variator_state.kept[:3] == (1, 0, (5,))
    assert same(plugins(whole.model), plugins(again.model))
    other = trainer(tmp_path / "whole", tiny.patched(head="EncoderModel", keep_first=2))
    with pytest.raises(ValueError, match="has plugins for keep_first=1, the model was patched"):
        other.train(resume_from_checkpoint=True)
