"""save_pretrained as a checkpoint: plugins travel beside the plain model, and come back."""

import json
import logging
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, RepoUrl
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, EncoderDecoderModel, Trainer, TrainingArguments

import variator_kernels as vk
from tests.sites import tiny
from tests.train import toy

FILES = {"plugins.json", "plugins.safetensors"}


def classifier():
    return tiny.model("bert", "gelu", head="ForSequenceClassification", num_labels=2)


def rows(number=16):
    ids, mask = tiny.batch(*[6 + i % 4 for i in range(number)], width=9)
    labels = [i % 2 for i in range(number)]
    return [
        {"input_ids": i, "attention_mask": m, "labels": y}
        for i, m, y in zip(ids, mask, labels, strict=True)
    ]


def values(model):
    return [p.detach().clone() for p in vk.plugin_parameters(model)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def arguments(folder, **settings):
    given = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 0.1}
    given |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    return TrainingArguments(str(folder), **given | settings)


def trainer(folder, bottleneck=6, **settings):
    """A plain Trainer of a patched model whose base is frozen."""
    model = classifier().requires_grad_(False)
    vk.patch(model, ratio=2, ratios=(2,), bottleneck=bottleneck)
    return Trainer(model, arguments(folder, **settings), train_dataset=rows(), eval_dataset=rows())


def keeps(made, step):
    """The plugins of each step."""
    kept = {}

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **rest):
            kept[state.global_step] = values(model)

    made.add_callback(Keep())
    made.train(**step)
    return kept


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


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_a_state_dict_without_plugins_is_said_aloud(variant, recwarn):
    plain, model = tiny.model(*variant).state_dict(), tiny.patched(*variant)
    model.load_state_dict(model.state_dict())
    model.load_state_dict({"x": torch.ones(1)}, strict=False)
    assert not recwarn
    before = values(model)
    with pytest.warns(UserWarning, match="no plugins for this patched model") as told:
        model.load_state_dict(plain, strict=False)
    assert len(told) == 1 and same(before, values(model))
    with (
        pytest.warns(UserWarning, match="no plugins"),
        pytest.raises(RuntimeError, match="plugins"),
    ):
        model.load_state_dict(plain)


def outer(kind):
    """A model and the part of it that is patched."""
    if kind == "dpr":
        settings = tiny.config("bert", "gelu").to_dict()
        del settings["model_type"]
        made = transformers.DPRQuestionEncoder(transformers.DPRConfig(**settings))
        return made, made.question_encoder.bert_model
    if kind == "encoder-decoder":
        both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
            tiny.config("bert", "gelu"), tiny.config("bert", "gelu")
        )
        made = EncoderDecoderModel(both)
        return made, made.encoder
    family, _, head = kind.partition(" ")
    made = tiny.model(family, dict(tiny.VARIANTS)[family], head=head)
    return made, tiny.encoder(made)


OUTER = ["dpr", "encoder-decoder", "t5 ForConditionalGeneration", "umt5 EncoderModel"]
OUTER += [f"{family} ForSequenceClassification" for family in tiny.BERTS]


@pytest.mark.parametrize("kind", OUTER)
def test_the_owner_of_a_patched_encoder_saves_a_plain_checkpoint(kind, tmp_path, caplog):
    model, inner = outer(kind)
    model.save_pretrained(tmp_path / "dense")
    vk.patch(inner, ratio=2, ratios=(2, 4), bottleneck=6)
    tiny.train_plugins(inner)
    ignored = model._keys_to_ignore_on_save
    model.save_pretrained(tmp_path / "saved")
    assert model._keys_to_ignore_on_save == ignored
    names = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == names | FILES
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("dense", "saved")]
    assert weights[0].keys() == weights[1].keys()
    with caplog.at_level(logging.WARNING):
        plain = type(model).from_pretrained(tmp_path / "saved")
    assert "plugins" not in caplog.text and "UNEXPECTED" not in caplog.text
    vk.load_plugins(plain, tmp_path / "saved")
    assert same(values(plain), values(model))
    vk.unpatch(inner)
    model.save_pretrained(tmp_path / "dense")
    assert {path.name for path in (tmp_path / "dense").iterdir()} == names


def test_a_model_made_around_a_patched_one(tmp_path):
    inner, made = tiny.patched("bert", "gelu", ratio=2), classifier()
    made.bert = inner
    made.save_pretrained(tmp_path)
    assert not any("plugins" in key for key in load_file(tmp_path / "model.safetensors"))
    plain = type(made).from_pretrained(tmp_path)
    vk.load_plugins(plain, tmp_path)
    assert same(values(plain), values(made))


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


def test_what_is_given_to_save_is_what_is_saved(tmp_path):
    model = tiny.patched("bert", "gelu", ratio=2)
    given = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(given))
    assert same(values_in(tmp_path), [given[key] for key in given if ".plugins." in key])
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not FILES & {path.name for path in (tmp_path / "other").iterdir()}


def values_in(folder):
    plain = tiny.model("bert", "gelu")
    vk.load_plugins(plain, folder)
    return values(plain)


def test_nothing_is_written_where_saving_fails(tmp_path, monkeypatch):
    model = tiny.patched("bert", "gelu", ratio=2)
    before = dict(vars(model))
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    assert not FILES & {path.name for path in tmp_path.iterdir()}
    assert vars(model) == before
    (tmp_path / "file").write_text("")
    model.save_pretrained(tmp_path / "file")  # transformers logs an error


def test_several_patched_encoders_in_one_model(tmp_path):
    class Two(transformers.PreTrainedModel):
        config_class = transformers.BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.a, self.b = transformers.BertModel(config), transformers.BertModel(config)
            self.post_init()

    model = Two(tiny.config("bert", "gelu"))
    vk.patch(model.a, ratio=2)
    vk.patch(model.b, ratio=2)
    with pytest.warns(UserWarning, match="leaves out the plugins of 2 patched encoders"):
        model.save_pretrained(tmp_path)
    assert not FILES & {path.name for path in tmp_path.iterdir()}
    assert not any("plugins" in key for key in load_file(tmp_path / "model.safetensors"))


@pytest.fixture
def uploaded(monkeypatch):
    """What a push sends, in place of the hub."""
    sent = []

    def upload(self, working_dir, repo_id, files_timestamps, **rest):
        for path in Path(working_dir).iterdir():
            if path.stat().st_mtime > files_timestamps.get(path.name, 0):
                sent.append(path.name)

    hub = "transformers.utils.hub"
    monkeypatch.setattr(f"{hub}.PushToHubMixin._upload_modified_files", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **rest: RepoUrl("https://hf.co/a/b"))
    for module in (hub, "transformers.modeling_utils"):
        card = ModelCard("---\n---\n")
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *a, card=card, **k: card)
    name = f"{hub}.PushToHubMixin._create_repo"  # transformers 4
    monkeypatch.setattr(name, lambda *args, **rest: "a/b", raising=False)
    return sent


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_a_push_brings_the_plugins(head, uploaded, tmp_path):
    model = tiny.patched("bert", "gelu", head=head, ratio=2)
    model.push_to_hub("mine/repo")
    assert set(uploaded) >= FILES | {"model.safetensors"}
    uploaded.clear()
    vk.save_plugins(tiny.patched("bert", "gelu", ratio=4), tmp_path)  # older ones there
    model.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="mine/repo")
    assert set(uploaded) >= FILES | {"model.safetensors"}
    assert json.loads((tmp_path / "plugins.json").read_text())["level"] == {"ffn": [2, 2]}


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


UNPICKLED = """
    import sys, torch
    model = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
    model.save_pretrained(sys.argv[1] + "/saved")
"""


def test_an_unpickled_model_in_a_process_that_patched_nothing(tmp_path):
    model = tiny.patched("bert", "gelu", ratio=2)
    torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", textwrap.dedent(UNPICKLED), str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, timeout=120)
    assert same(values_in(tmp_path / "saved"), values(model))
    assert same(values(pickle.loads(pickle.dumps(model))), values(model))


def test_accelerates_own_state(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(tiny.patched("bert", "gelu", head="ForSequenceClassification"))
    before = values(model)
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for parameter in vk.plugin_parameters(model):
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    assert same(values(model), before)


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


SHARDED = """
    import sys, torch
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    import variator_kernels as vk
    from tests.sites import tiny

    folder = sys.argv[1]
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    model = tiny.patched(head="EncoderModel", ratios=(4,))
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    ids, mask = tiny.batch(9, 4)
    with torch.no_grad():
        model(ids, attention_mask=mask)
    model.save_pretrained(folder, state_dict=dict(whole))
    plain = tiny.model(head="EncoderModel")
    vk.load_plugins(plain, folder)
    wanted = [value for key, value in whole.items() if ".plugins." in key]
    assert all(map(torch.equal, vk.plugin_parameters(plain), wanted))
    destroy_process_group()
"""


def test_a_sharded_model_and_its_whole_state_dict(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SHARDED), str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, timeout=120)
