"""save_pretrained as a checkpoint: plugins travel beside the plain model, and come back."""

import json
import logging
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, RepoUrl
from safetensors.torch import load_file
from transformers import EncoderDecoderModel

import variator_kernels as vk
from tests.sites import tiny
from tests.train.plain import FILES, classifier, same, values


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
    tiny.train_plugins(model)
    model.save_pretrained(tmp_path)
    for name in ("a", "b"):
        assert {path.name for path in (tmp_path / name).iterdir()} == FILES
    assert not FILES & {path.name for path in tmp_path.iterdir()}
    assert not any("plugins" in key for key in load_file(tmp_path / "model.safetensors"))
    again = Two.from_pretrained(tmp_path)
    vk.load_plugins(again, tmp_path)
    ids, mask = tiny.batch(9, 4)
    for ours, wanted in ((again.a, model.a), (again.b, model.b)):
        assert torch.equal(
            tiny.encode(ours.eval(), ids, mask), tiny.encode(wanted.eval(), ids, mask)
        )


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


SHARDED = """
    import sys, torch
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import Trainer
    import variator_kernels as vk
    from tests.sites import tiny
    from variator_kernels import pretrained

    folder = sys.argv[1]
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    model = tiny.patched(head="EncoderModel", ratios=(4,))
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for part in (model.encoder.block[0], model):  # one block is a unit, the other in the rest
        fully_shard(part, mp_policy=policy, reshard_after_forward=False)
    ids, mask = tiny.batch(9, 4)
    wanted = [value for key, value in whole.items() if ".plugins." in key]
    with torch.no_grad():
        model(ids, attention_mask=mask)
    assert {p.dtype for p in vk.plugin_parameters(model)} == {torch.bfloat16}, "copies"
    model.save_pretrained(folder, state_dict=dict(whole))
    plain = tiny.model(head="EncoderModel")
    vk.load_plugins(plain, folder)
    assert all(map(torch.equal, vk.plugin_parameters(plain), wanted))

    made = Trainer.__new__(Trainer)
    made.model, made.is_in_train = model, False
    for parameter in vk.plugin_parameters(model):
        parameter.data.zero_()
    with torch.no_grad():
        model(ids, attention_mask=mask)
    Trainer._load_best_model = lambda self, folder: None
    pretrained.install()
    made._load_best_model(folder)
    loaded = [parameter.full_tensor() for parameter in vk.plugin_parameters(model)]
    assert all(map(torch.equal, loaded, wanted))
    destroy_process_group()
"""


def test_a_sharded_model_and_its_whole_state_dict(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SHARDED), str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, timeout=120)
