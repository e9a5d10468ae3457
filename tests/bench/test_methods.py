"""bench.methods from end to end on toy models; its figures mean nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.methods import __main__ as bench
from bench.methods import measuring, registry, training
from bench.methods.registry import Method
from bench.methods.tasks import Classification
from bench.rivals import token_pruning
from tests.train import toy

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("few_steps")]
SMALL = ("--steps", "4", "--batch", "4", "--calibrate", "20", "--rows", "12", "--rounds", "2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    toy.table(data / "train.tsv", 60)
    toy.table(data / "dev.tsv", 30)
    toy.table(data / "test.tsv", 20)
    toy.bert(tmp_path / "model", spread=0.4)
    return tmp_path


def run(folder: Path, *more: Any, task: str = "sst2", code: int = 0) -> Any:
    words = ["--model", folder / "model", "--data", folder / "data", "--work", folder / "work"]
    words += ["--output", folder / "out", "--task", task, *SMALL]
    words += ["--original", folder / "model"] if task == "sst2" else []
    assert bench.main([str(word) for word in (*words, *more)]) == code
    return json.loads((folder / "out" / f"methods_model_{task}.json").read_text())


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*") if p.is_file()}


@pytest.mark.slow
def test_every_method_of_an_encoder(folder):
    curves = {"FFN pruned": ("50 %", "25 %"), "tokens pruned": ("50 %", "25 %"),
              "plugins": ("k=2", "k=8")}  # fmt: skip
    firsts = {method.name: method.label for method in reversed(registry.encoders(2))}
    wanted = set(firsts.values()) | {f"{name}, {to}" for name, (_, to) in curves.items()}
    methods = [m for m in registry.encoders(2) if m.label in wanted]
    chosen = ("--seeds", "1", "--methods", *wanted)
    content = run(folder, *chosen)
    labels = [(row["method"], row["setting"]) for row in content["costs"]]
    assert labels == [(method.name, method.setting) for method in methods]
    assert {row["status"] for row in content["costs"]} == {"ok"}
    rows = {(row["method"], row["setting"]): row for row in content["summary"]}
    for row in rows.values():
        assert 0 <= row["dev"] <= 1 and 0 <= row["test"] <= 1 and row["seeds"] == 1
        assert row["speedup"]["median"] > 0 and row["weights_bytes"] > 0 and row["peak_bytes"] > 0
    assert rows["original", ""]["multiply_adds"] == rows["int8", ""]["multiply_adds"] == 1
    assert rows["original", ""]["added"] == 0 < rows["plugins", "k=2"]["added"]
    for name, (one, other) in curves.items():
        assert rows[name, other]["multiply_adds"] < rows[name, one]["multiply_adds"]
    path = folder / "out" / "methods_model_sst2"
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert len(path.with_suffix(".md").read_text().splitlines()) == 2 + len(methods)
    before = stamps(folder)
    again = run(folder, *chosen)
    assert again["rows"] == content["rows"] and stamps(folder) == before


@pytest.mark.slow
def test_every_method_of_a_decoder(folder):
    shutil.rmtree(folder / "model")
    toy.llama(folder / "model", hidden_size=32, head_dim=8)
    (folder / "data" / "wikitext2").mkdir()
    for name in ("valid.txt", "test.txt"):
        toy.plain_text(folder / "data" / "wikitext2" / name, 60)
    content = run(folder, "--seeds", "1", "--length", "100", task="wikitext2")
    assert len(content["costs"]) == len(registry.decoders(2))
    assert {row["status"] for row in content["costs"]} == {"ok"}
    assert all(row["test"] > 1 and row["dev"] is None for row in content["summary"])
    few = run(folder, "--seeds", "1", "--length", "100", "--methods", "pruned", task="wikitext2")
    assert [row["method"] for row in few["costs"]] == ["original", "pruned", "pruned"]


def test_a_method_that_was_killed_goes_on_and_other_settings_are_refused(folder, capsys):
    chosen = ("--methods", "student", "--seeds", "2")
    content = run(folder, *chosen)
    assert len(content["rows"]) == 3  # the original has no seeds
    made = folder / "work" / "student-1-of-2" / "seed1"
    weights = (made / "stage0" / training.WEIGHTS).read_bytes()
    (made / "answers.json").unlink()
    (made / "stage0" / training.WEIGHTS).unlink()
    assert run(folder, *chosen)["rows"] == content["rows"]
    assert (made / "stage0" / training.WEIGHTS).read_bytes() == weights
    with pytest.raises(SystemExit):
        run(folder, *chosen, "--steps", "5")
    assert "made with another steps" in capsys.readouterr().err


def test_training_goes_on_from_a_checkpoint(folder, monkeypatch):
    """The interrupted run ends with the weights of the whole one."""

    def task() -> Classification:
        return Classification(folder / "model", "sst2", folder / "data", 20, 12)

    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_steps": 2}
    whole, part = (token_pruning.learned(task().model, 0.5) for _ in range(2))
    training.fit(whole, folder / "whole", task(), task().weights, 0, max_steps=6, **settings)
    real = training.MethodTrainer.compute_loss

    def failing(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(training.MethodTrainer, "compute_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        training.fit(part, folder / "part", task(), task().weights, 0, max_steps=6, **settings)
    monkeypatch.setattr(training.MethodTrainer, "compute_loss", real)
    part = token_pruning.learned(task().model, 0.5)
    training.fit(part, folder / "part", task(), task().weights, 0, max_steps=6, **settings)
    for (name, one), other in zip(whole.named_parameters(), part.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not (folder / "part" / "run").exists()


def test_the_loss_is_zero_for_the_original_itself(folder):
    task = Classification(folder / "model", "sst2", folder / "data", 20, 12)
    batch = dict(task.collate([task.train[i] for i in range(4)]))
    given = {k: v for k, v in batch.items() if k != "labels"}
    same = task.model(**given, output_hidden_states=True)
    assert training.loss(same, same, batch, task.weights, task.model).item() == pytest.approx(0)
    labels = training.Weights(labels=1.0)
    expected = task.model(**batch).loss
    assert torch.allclose(training.loss(same, same, batch, labels, task.model), expected)


def test_no_number_without_its_check(folder, monkeypatch):
    def wrong(share: float) -> Any:
        return lambda model, task: token_pruning.fixed(model, 0.5)

    real = registry.encoders

    def broken(count: int) -> list[Method]:
        made = [m for m in real(count) if m.name in ("original", "tokens pruned")]
        return [m if not m.neutral else m._replace(neutral=wrong(1.0)) for m in made]

    monkeypatch.setattr(registry, "encoders", broken)
    content = run(folder, "--seeds", "1", code=1)
    for row in content["costs"][1:]:
        assert row["status"] == "failed" and "must change nothing" in row["reason"]
        assert "speedup" not in row


def test_distance_sees_what_is_wrong():
    one = torch.tensor([[1.0, -2.0]])
    assert measuring.distance(one, one) == 0
    assert measuring.distance(one * torch.nan, one) == float("inf")
    assert measuring.distance(one, one * torch.nan) == float("inf")
    assert measuring.distance(0 * one, 0 * one) == 0
    assert measuring.distance(one, 0 * one) == float("inf")
    assert measuring.distance(one[0], one) == float("inf")
    assert measuring.distance(one + 1, one) == 0.5


def test_lists_without_any_work(folder, capsys):
    words = ["--original", str(folder / "model"), "--work", str(folder / "work"), "--list"]
    assert bench.main(words) == 0
    said = capsys.readouterr().out
    assert "plugins, int8, k=4" in said and "student, 1 of 2" in said
    assert not (folder / "work").exists()


def test_refuses(folder, capsys):
    for more, message in (
        (("--methods", "magic"), "methods must be of"),
        (("--steps", "-1"), "steps must be >= 0"),
        (("--task", "wikitext2"), "original must not be given"),
    ):
        with pytest.raises(SystemExit):
            run(folder, *more)
        assert message in capsys.readouterr().err


def test_nothing_decays(folder, monkeypatch):
    found = []
    real = training.MethodTrainer.create_optimizer

    def spy(self, *args, **kwargs):
        found.append(real(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(training.MethodTrainer, "create_optimizer", spy)
    wanted = ("plugins, k=2", "FFN pruned, 50 %", "thresholds, 50 %", "projected, 50 %")
    run(folder, "--seeds", "1", "--methods", *wanted)
    assert found and all(g["weight_decay"] == 0 for o in found for g in o.param_groups)
