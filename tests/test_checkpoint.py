"""Plugin files: our own and the authors', into patched and unpatched models."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels import checkpoint


def same(a, b):
    ids, mask = tiny.batch(9, 4)
    return all(
        torch.equal(tiny.encode(a, ids, mask), tiny.encode(b, ids, mask))
        for k in (2, 4)
        if vk.set_ratio(a, k) is None and vk.set_ratio(b, k) is None
    )


@pytest.fixture
def folder(tmp_path):
    vk.save_plugins(tiny.patched(ratio=2), tmp_path / "new" / "plugins")
    return tmp_path / "new" / "plugins"


def values(model):
    return [p.clone() for p in vk.plugin_parameters(model)]


def unchanged(model, before):
    return all(torch.equal(a, b) for a, b in zip(before, vk.plugin_parameters(model), strict=True))


def test_round_trip(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["plugins.json", "plugins.safetensors"]
    patched = vk.patch(tiny.model(), ratio=4, ratios=(2, 4), bottleneck=6)
    vk.load_plugins(patched, folder)
    assert patched.encoder.variator_state.ratio == 4
    assert same(patched, tiny.patched())
    plain = tiny.model()
    vk.load_plugins(plain, folder / "plugins.safetensors")
    assert plain.encoder.variator_state.ratio == 2
    assert plain.encoder.variator_state.ratios == (2, 4)
    assert same(plain, tiny.patched())
    vk.save_plugins(plain, folder)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("family", tiny.BERTS)
def test_round_trip_of_a_bert(family, tmp_path):
    model = tiny.patched(family, "gelu", head="ForSequenceClassification")
    vk.save_plugins(model, tmp_path)
    plain = tiny.model(family, "gelu", head="ForSequenceClassification")
    vk.load_plugins(plain, tmp_path)
    assert same(plain, model)
    vk.load_plugins(tiny.model(family, "gelu", head="ForMaskedLM"), tmp_path)
    with pytest.raises(ValueError, match=f"has family '{family}', the model has 't5'"):
        vk.load_plugins(tiny.model(), tmp_path)


def test_settings_say_what_they_are_for(folder):
    settings = json.loads((folder / "plugins.json").read_text())
    assert settings.pop("base")
    assert settings == {
        "format": 2,
        "method": "variator",
        "written_by": vk.__version__,
        "family": "t5",
        "hidden_size": 24,
        "layers": 2,
        "bottleneck": 6,
        "activation": "tanh",
        "placements": {"ffn": [2, 4]},
        "level": {"ffn": [2, 2]},
        "keep_first": 0,
        "keep_last": 0,
        "keep": [],
        "window": 64,
    }


def test_takes_the_modules_dtype(folder):
    model = vk.patch(tiny.model().to(torch.bfloat16), ratios=(2, 4), bottleneck=6)
    vk.load_plugins(model, folder)
    for got, saved in zip(
        vk.plugin_parameters(model), vk.plugin_parameters(tiny.patched()), strict=True
    ):
        assert got.requires_grad
        assert torch.equal(got, saved.bfloat16())


def test_other_ratios_of_the_model_stay(folder):
    model = tiny.patched(ratios=(2, 4, 8))
    before = {k: p.clone() for k, p in model.named_parameters() if ".plugins." in k}
    with torch.no_grad():
        for parameter in vk.plugin_parameters(model):
            parameter.add_(1)
    vk.load_plugins(model, folder)
    for key, parameter in model.named_parameters():
        if ".plugins.8." in key:
            assert torch.equal(parameter, before[key] + 1)
    assert same(model, tiny.patched())


def test_an_interrupted_save_keeps_the_old_files(folder, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        vk.save_plugins(tiny.patched(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_loaded_plugins_are_looked_at_again(folder):
    model = vk.patch(tiny.model(), ratios=(2, 4), bottleneck=6)
    ids, mask = tiny.batch(9)
    with pytest.warns(UserWarning, match="untrained"):
        tiny.encode(model, ids, mask)
    vk.load_plugins(model, folder)
    assert not model.encoder.variator_state.warned


def first_format(folder):
    """The folder as version 0.1.0 wrote it."""
    tensors = load_file(folder / "plugins.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        _, layer, ratio, field = name.split(".", 3)
        renamed[f"layer.{layer}.ratio.{ratio}.{field}"] = tensor
    settings = {"format": 1, "family": "t5", "ratios": [2, 4], "ratio": 2, "bottleneck": 6}
    settings |= {"activation": "tanh", "hidden_size": 24, "layers": 2}
    text = json.dumps(settings, indent=2) + "\n"
    save_file(renamed, folder / "plugins.safetensors", {"settings": text})
    (folder / "plugins.json").write_text(text)


def test_reads_the_first_format(folder):
    first_format(folder)
    plain = tiny.model()
    vk.load_plugins(plain, folder)
    assert plain.encoder.variator_state.ratio == 2
    assert same(plain, tiny.patched())


KEPT = {"keep_first": 1, "keep_last": 2, "keep": (7, 3)}


def kept(model):
    return model.encoder.variator_state.kept[:3]


@pytest.fixture
def kept_folder(tmp_path):
    vk.save_plugins(tiny.patched(**KEPT), tmp_path / "kept")
    return tmp_path / "kept"


def test_what_is_kept_is_saved_and_adopted(kept_folder, folder):
    settings = json.loads((kept_folder / "plugins.json").read_text())
    assert {name: settings[name] for name in KEPT} == KEPT | {"keep": [3, 7]}
    plain, patched = tiny.model(), tiny.patched()
    for model in (plain, patched):
        vk.load_plugins(model, kept_folder)
        assert kept(model) == (1, 2, (3, 7))
    assert same(plain, tiny.patched(**KEPT))
    assert not same(plain, tiny.patched())
    for model in (plain, patched):  # nobody asked for anything: the next folder may change it
        vk.load_plugins(model, folder)
        assert kept(model) == (0, 0, ())
    assert same(plain, tiny.patched())


def test_the_first_format_keeps_nothing(folder):
    first_format(folder)
    for model in (tiny.model(), tiny.patched()):
        vk.load_plugins(model, folder)
        assert kept(model) == (0, 0, ())
    with pytest.raises(ValueError, match="has plugins for keep_first=0, the model was patched"):
        vk.load_plugins(tiny.patched(keep_first=1), folder)


@pytest.mark.parametrize(
    "given",
    [{"keep_first": 0}, {"keep_first": 2}, {"keep_last": 1}, {"keep": ()}, {"keep": (3,)}],
)
def test_refuses_plugins_that_keep_other_tokens(kept_folder, given):
    model = tiny.patched(**given)
    with torch.no_grad():
        for parameter in vk.plugin_parameters(model):
            parameter.add_(1)
    before, was = values(model), model.encoder.variator_state.kept
    (name,) = given
    with pytest.raises(ValueError, match=f"has plugins for {name}=.*was patched with {name}="):
        vk.load_plugins(model, kept_folder)
    assert unchanged(model, before)
    assert model.encoder.variator_state.kept == was


def test_what_was_asked_for_and_is_the_same_loads(kept_folder, folder):
    model = tiny.patched(keep_first=1)
    vk.load_plugins(model, kept_folder)
    assert kept(model) == (1, 2, (3, 7))
    with pytest.raises(ValueError, match="keep_first=0"):
        vk.load_plugins(model, folder)
    vk.load_plugins(tiny.patched(**KEPT), kept_folder)


def edit_settings(**changes):
    def edit(folder):
        tensors = load_file(folder / "plugins.safetensors")
        settings = json.loads((folder / "plugins.json").read_text()) | changes
        text = json.dumps(settings)
        save_file(tensors, folder / "plugins.safetensors", {"settings": text})
        (folder / "plugins.json").write_text(text)

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "plugins.safetensors")
        change(tensors)
        text = (folder / "plugins.json").read_text()
        save_file(tensors, folder / "plugins.safetensors", {"settings": text})

    return edit


def edit_text(old, new):
    def edit(folder):
        tensors = load_file(folder / "plugins.safetensors")
        before = (folder / "plugins.json").read_text()
        text = before.replace(old, new, 1)
        assert text != before
        save_file(tensors, folder / "plugins.safetensors", {"settings": text})
        (folder / "plugins.json").write_text(text)

    return edit


KEY = "ffn.1.4.adapter.w1"
DAMAGE = [
    (
        lambda f: (first_format(f), edit_settings(extra=1)(f)),
        ValueError,
        r"format 1 has no fields \['extra'\]",
    ),
    (lambda f: (f / "plugins.safetensors").unlink(), FileNotFoundError, "there is no file"),
    (lambda f: (f / "plugins.json").unlink(), FileNotFoundError, "must hold plugins.json"),
    (lambda f: (f / "plugins.json").write_text("{"), ValueError, "is damaged"),
    (lambda f: (f / "plugins.json").write_text("{}"), ValueError, "belongs to other tensors"),
    (lambda f: (f / "plugins.safetensors").write_bytes(b"12345678"), ValueError, "is damaged"),
    (edit_settings(format=3, written_by="0.9.0"), ValueError, "has format 3.*kernels 0.9.0"),
    (edit_settings(extra=1, written_by="0.9.0"), ValueError, r"fields \['extra'\].*kernels 0.9.0"),
    (edit_settings(method="other"), ValueError, "method must be 'variator', got 'other'"),
    (edit_settings(placements={"ffn": [0]}), ValueError, "ratios must be >= 2, got 0"),
    (edit_settings(placements={"head": [2]}), ValueError, "placements must be of"),
    (edit_settings(placements={"attention": [2]}), ValueError, "level must be of the placements"),
    (edit_settings(placements={}), ValueError, "placements must be of"),
    (edit_settings(level={"ffn": [2]}), ValueError, "level must have 2 layers"),
    (edit_settings(level={"ffn": [2, 3]}), ValueError, "level must hold ratios that have plugins"),
    (edit_settings(activation="x"), ValueError, "activation must be one of"),
    (edit_settings(family="mt5"), ValueError, "has family 'mt5', the model has 't5'"),
    (edit_settings(hidden_size=32), ValueError, "has hidden size 32, the model has 24"),
    (
        edit_settings(layers=3, level={"ffn": [2, 2, 2]}),
        ValueError,
        "has number of layers 3, the model has 2",
    ),
    (edit_tensors(lambda t: t.pop(KEY)), ValueError, r"missing keys \['ffn.1.4.adapter.w1"),
    (edit_tensors(lambda t: t.update(x=t[KEY].clone())), ValueError, r"unexpected keys \['x'\]"),
    (edit_tensors(lambda t: t.update({KEY: torch.ones(2)})), ValueError, "must have shape"),
    (edit_tensors(lambda t: t.update({KEY: t[KEY].int()})), ValueError, "must be floating point"),
    (edit_tensors(lambda t: t[KEY][0].fill_(float("nan"))), ValueError, f"{KEY} must be finite"),
    (edit_tensors(lambda t: t[KEY][-1].fill_(float("-inf"))), ValueError, f"{KEY} must be finite"),
    (
        edit_settings(placements={"ffn": [2, 4, 2]}),
        ValueError,
        "must name each ratio once",
    ),
    (edit_settings(placements={"ffn": [2, 4.0]}), ValueError, "ratios must be an integer.*got 4.0"),
    (edit_settings(placements={"ffn": [2, "4"]}), ValueError, "ratios must be an integer"),
    (edit_settings(placements={"ffn": 2}), ValueError, "placements must hold a list"),
    (edit_settings(level={"ffn": [2, 4.0]}), ValueError, "level must be an integer.*got 4.0"),
    (edit_settings(level={"ffn": [True, 2]}), ValueError, "level must be an integer.*got True"),
    (edit_settings(level=None), ValueError, "level must be of"),
    (edit_settings(format=True), ValueError, "format must be an integer.*got True"),
    (edit_settings(format=2.0), ValueError, "format must be an integer.*got 2.0"),
    (edit_settings(layers=2.0), ValueError, "layers must be an integer.*got 2.0"),
    (edit_settings(layers=None), ValueError, "layers must be an integer.*got None"),
    (edit_settings(hidden_size="24"), ValueError, "hidden_size must be an integer.*got '24'"),
    (edit_settings(bottleneck=[6]), ValueError, "bottleneck must be an integer"),
    (edit_settings(activation=["tanh"]), ValueError, "activation must be one of"),
    (edit_settings(activation=None), ValueError, "activation must be one of"),
    (edit_settings(family=5), ValueError, "family must be a model_type, got 5"),
    (edit_settings(method=None), ValueError, "method must be 'variator', got None"),
    (edit_settings(written_by=2), ValueError, "written_by must be a version, got 2"),
    (edit_settings(keep_first=False), ValueError, "keep_first must be an integer.*got False"),
    (edit_settings(keep_first=0.0), ValueError, "keep_first must be an integer.*got 0.0"),
    (edit_settings(keep_first=None), ValueError, "keep_first must be an integer.*got None"),
    (edit_settings(keep_last=""), ValueError, "keep_last must be an integer.*got ''"),
    (edit_settings(keep_last=-1), ValueError, "keep_last must be >= 0, got -1"),
    (edit_settings(keep=0), ValueError, "keep must be a list of token ids, got 0"),
    (edit_settings(keep=""), ValueError, "keep must be a list of token ids, got ''"),
    (edit_settings(keep=[0.5]), ValueError, "keep must be an integer.*got 0.5"),
    (edit_settings(keep=[True]), ValueError, "keep must be an integer.*got True"),
    (edit_settings(keep=[3, 3]), ValueError, "keep must name each token id once"),
    (edit_settings(keep=[3, 40]), ValueError, "below the vocabulary's size, 40, got 40"),
    (edit_settings(keep_first=2**31), ValueError, "keep_first must be <= 2147483647"),
    (edit_settings(keep_last=2**70), ValueError, "keep_last must be <= 2147483647"),
    (edit_text('"format": 2,', '"format": 1, "format": 2,'), ValueError, "has 'format' twice"),
    (edit_text('"ffn"', '"ffn": [8], "ffn"'), ValueError, "has 'ffn' twice"),
    (edit_text("24", "[" * 10**5), ValueError, "is damaged"),
]


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE)
def test_refuses_damaged_files(folder, damage, error, message):
    damage(folder)
    model, plain = tiny.patched(), tiny.model()
    before = values(model)
    for given in (model, plain):
        with pytest.raises(error, match=message):
            vk.load_plugins(given, folder)
    assert unchanged(model, before)
    assert not any(".plugins." in key for key in plain.state_dict())


OTHERS = [
    ({"num_layers": 3}, {}, "number of layers 2, the model has 3"),
    ({"d_model": 32}, {}, "hidden size 24, the model has 32"),
    ({}, {"bottleneck": 7}, "bottleneck 6, the model has 7"),
    ({}, {"activation": "identity"}, "activation 'tanh', the model has 'identity'"),
    ({}, {"ratio": 4, "ratios": (4,)}, r"ratios \[2, 4\], the model has plugins for \(4,\)"),
]


@pytest.mark.parametrize(("config", "patch", "message"), OTHERS)
def test_refuses_another_models_files(folder, config, patch, message, monkeypatch):
    monkeypatch.setattr(tiny, "SIZES", tiny.SIZES | config)
    model = vk.patch(tiny.model(), **{"ratios": (2, 4), "bottleneck": 6} | patch)
    before = values(model)
    with pytest.raises(ValueError, match=message):
        vk.load_plugins(model, folder)
    assert unchanged(model, before)


def test_refuses_unpatched_models(tmp_path):
    with pytest.raises(ValueError, match="model is not patched"):
        vk.save_plugins(tiny.model(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        vk.load_plugins(tiny.model(), tmp_path / "none")


def test_names_what_it_was_given_instead_of_a_folder(folder):
    model = tiny.patched(ratio=2)
    with pytest.raises(ValueError, match="source must be the folder of plugins"):
        vk.load_plugins(model, folder / "plugins.json")
    with pytest.raises(ValueError, match="folder must be a folder"):
        vk.save_plugins(model, folder / "plugins.json")


SHARDED = """
    import sys, torch
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    import variator_kernels as vk
    from tests.sites import tiny

    init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
    model = tiny.patched(head="EncoderModel", ratios=(4,))
    before = [p.clone() for p in vk.plugin_parameters(model)]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    ids, mask = tiny.batch(9, 4)
    forward = torch.no_grad()(model)
    forward(ids, attention_mask=mask)
    assert vk.plugin_parameters(model)[0].dtype == torch.bfloat16, "a copy is in its place"
    vk.save_plugins(model, sys.argv[1])
    for parameter in vk.plugin_parameters(model):
        parameter.data.zero_()
    forward(ids, attention_mask=mask)
    vk.load_plugins(model, sys.argv[1])
    after = [p.full_tensor() for p in vk.plugin_parameters(model)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    destroy_process_group()
"""


def test_shards_are_saved_and_filled_not_their_copies(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SHARDED), str(tmp_path)]
    root = Path(__file__).parents[1]
    subprocess.run(command, cwd=root, check=True, timeout=120)


def test_refuses_to_save_what_is_not_there(tmp_path):
    model = tiny.patched(ratio=2)
    vk.plugin_parameters(model)[0].data = torch.empty(0)
    with pytest.raises(ValueError, match=r"must hold its plugins, ffn.0.2.* is empty"):
        vk.save_plugins(model, tmp_path)
    assert not list(tmp_path.iterdir())
