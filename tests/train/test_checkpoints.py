"""Checkpoints: none of anybody's is lost, and none that nobody can use is written."""

import pytest
import torch

from tests.train.test_trainer import plugins, trainer
from variator_kernels.train import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_those_of_other_programs_stay(tmp_path):
    foreign = tmp_path / "checkpoint-1"
    foreign.mkdir()
    (foreign / "model.safetensors").touch()
    trainer(tmp_path, save_total_limit=1).train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-6"]
    assert names(foreign) == ["model.safetensors"]


def test_the_one_just_written_stays_beside_those_of_a_longer_run(tmp_path):
    trainer(tmp_path, save_total_limit=1).train()
    trainer(tmp_path, save_total_limit=1, max_steps=2).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]


def test_half_removed_is_not_whole(tmp_path, monkeypatch):
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        checkpoints.start(folder)
        assert checkpoints.last(tmp_path) != folder
        checkpoints.finish(folder)
        assert checkpoints.last(tmp_path) == folder

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.clean(tmp_path, 1)
    monkeypatch.undo()
    checkpoints.clean(tmp_path, None)
    assert names(tmp_path) == ["checkpoint-2"]


def test_plugins_that_are_not_finite_are_not_saved(tmp_path):
    made = trainer(tmp_path)
    step = made.training_step

    def poisoned(*args, **kwargs):
        loss = step(*args, **kwargs)
        if made.state.global_step == 5:
            next(p for p in made.model.parameters() if p.requires_grad).grad.fill_(float("nan"))
        return loss

    made.training_step = poisoned
    with pytest.raises(FloatingPointError, match=r"plugins after step 5 .*checkpoint-4: low"):
        made.train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert all(torch.isfinite(value).all() for value in plugins(again.model))
