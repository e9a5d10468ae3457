"""Plugin files say which tokens stay whole."""

import json

import pytest
import torch

import variator_kernels as vk
from tests.checkpoint.cases import (
    first_format,
    same,
    unchanged,
    values,
)
from tests.sites import tiny

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
