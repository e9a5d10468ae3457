"""Damaged plugin files, those of other models, and what is no folder of plugins."""

import pytest
import torch

import variator_kernels as vk
from tests.checkpoint.cases import (
    edit_settings,
    edit_tensors,
    edit_text,
    first_format,
    unchanged,
    values,
)
from tests.sites import tiny

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
    *(
        (edit_settings(untrained=given), ValueError, "untrained must hold lists of layers")
        for given in (
            [],
            {"ffn": [0]},
            {"ffn": {"4": [0.5]}},
            {"ffn": {"4": [2]}},
            {"ffn": {"04": [0]}},
            {"ffn": {"9": [0]}},
            {"attention": {"4": [0]}},
        )
    ),
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


def test_refuses_to_save_what_is_not_there(tmp_path):
    model = tiny.patched(ratio=2)
    vk.plugin_parameters(model)[0].data = torch.empty(0)
    with pytest.raises(ValueError, match=r"must hold its plugins, ffn.0.2.* is empty"):
        vk.save_plugins(model, tmp_path)
    assert not list(tmp_path.iterdir())
