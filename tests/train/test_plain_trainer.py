"""A Trainer of transformers or sentence-transformers brings plugins back from its checkpoints."""

import json
import logging
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from torch import nn
from transformers import AutoModel, Trainer

import variator_kernels as vk
from tests.sites import tiny
from tests.train import toy
from tests.train.plain import FILES, arguments, classifier, keeps, rows, same, trainer, values


def test_a_trainer_ends_with_its_best_plugins(tmp_path):
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    made = trainer(tmp_path, metric_for_best_model="step", greater_is_better=True, **settings)
    best = {1: 0.0, 2: 1.0, 3: 0.5}
    made.compute_metrics = lambda _: {"step": best[made.state.global_step]}
    kept = keeps(made, {})
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    assert not same(kept[2], kept[3])
    assert same(values(made.model), kept[2])


def test_a_resumed_trainer_has_the_checkpoints_plugins(tmp_path):
    whole = keeps(trainer(tmp_path), {})
    plain = AutoModel.from_pretrained(tmp_path / "checkpoint-2")
    assert not any(".plugins." in key for key in plain.state_dict())
    again = trainer(tmp_path)
    after = keeps(again, {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")})
    assert list(after) == [3] and same(after[3], whole[3])


def test_a_trainer_refuses_another_models_plugins_before_it_loads(tmp_path):
    trainer(tmp_path, max_steps=1).train()
    again = trainer(tmp_path, bottleneck=7)
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.add_(1)
    before = {key: value.clone() for key, value in again.model.state_dict().items()}
    with pytest.raises(ValueError, match="has bottleneck 6, the model has 7"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(v, before[key]) for key, v in again.model.state_dict().items())


def test_a_checkpoint_without_plugins_is_said_aloud(tmp_path):
    trainer(tmp_path, max_steps=1).train()
    for name in FILES:
        (tmp_path / "checkpoint-1" / name).unlink()
    with pytest.warns(UserWarning, match=r"no plugins for this patched model.*load_plugins"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_shards_of_a_checkpoint(tmp_path, caplog):
    model = tiny.patched("bert", "gelu", head="ForSequenceClassification", ratio=2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert not any("plugins" in key for key in index["weight_map"])
    again = classifier().requires_grad_(False)
    vk.patch(again, ratio=2, ratios=(2, 4), bottleneck=6)
    made = Trainer(again, arguments(tmp_path / "out"))
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        made._load_from_checkpoint(resume_from_checkpoint=str(tmp_path))
    assert same(values(again), values(model))
    assert "missing keys" not in caplog.text
    assert not again._keys_to_ignore_on_save


def test_a_trainer_pushes_them_from_its_checkpoints(tmp_path, monkeypatch):
    pushed, done = [], Future()

    def upload(*args, folder_path, **rest):
        pushed.append({path.name for path in Path(folder_path).iterdir()})
        return done

    done.set_result(None)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr("transformers.trainer.upload_folder", upload, raising=False)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **rest: None)
    made = trainer(tmp_path, max_steps=1, push_to_hub=True)
    made.hub_model_id, made.push_in_progress = "mine/repo", None
    made.train()
    assert pushed[0] >= FILES and "model.safetensors" in pushed[0]


def test_a_trainer_of_a_module_that_holds_a_patched_model(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = classifier().requires_grad_(False)
            vk.patch(self.inner, ratio=2, ratios=(2,), bottleneck=6)

        def forward(self, input_ids, attention_mask, labels):
            return self.inner(input_ids, attention_mask, labels=labels)

    made = Trainer(Outer(), arguments(tmp_path), train_dataset=rows())
    kept = keeps(made, {})
    made._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert same(values(made.model), kept[2])


def test_a_sentence_transformer(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    made = library.SentenceTransformer(str(toy.bert(tmp_path / "bert")), device="cpu").eval()
    vk.patch(made, ratio=2, ratios=(2,), bottleneck=6)
    tiny.train_plugins(made)
    before = values(made)
    made.save(str(tmp_path / "saved"))
    plain = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu").eval()
    vk.load_plugins(plain, tmp_path / "saved")
    assert same(values(plain), before)
    kind = library.SentenceTransformerTrainer
    trainer = kind.__new__(kind)  # made in full it wants the package datasets
    trainer.model, trainer.state = made, transformers.TrainerState()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)
    trainer._load_from_checkpoint(str(tmp_path / "saved"))
    assert same(values(made), before)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)
    trainer.state.best_model_checkpoint = str(tmp_path / "saved")
    trainer._load_best_model()
    assert same(values(made), before)
    assert same(made.state_dict().values(), plain.state_dict().values())


@pytest.mark.parametrize("patched_first", [True, False])
def test_a_trainer_of_low_rank_adapters(patched_first, tmp_path):
    peft = pytest.importorskip("peft")

    def made():
        model = classifier()
        if patched_first:
            vk.patch(model, ratio=2, ratios=(2,), bottleneck=6)
        settings = peft.LoraConfig(target_modules=["query"], r=3, task_type="SEQ_CLS")
        model = peft.get_peft_model(model, settings)
        if not patched_first:
            vk.patch(model, ratio=2, ratios=(2,), bottleneck=6)
        for parameter in vk.plugin_parameters(model):
            parameter.requires_grad_(True)  # peft freezes all that is there
        return Trainer(model, arguments(tmp_path), train_dataset=rows())

    whole = keeps(made(), {})
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} >= FILES
    after = keeps(made(), {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")})
    assert list(after) == [3] and same(after[3], whole[3])
