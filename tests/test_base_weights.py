"""Plugins of one checkpoint in a model with the weights of another: said, and done."""

import json
import warnings

import pytest
import torch

import variator_kernels as vk
from tests.checkpoint.cases import edit_settings
from tests.sites import tiny
from variator_kernels.sites import base_weights
from variator_kernels.sites.find import find

WARNING = "plugins of a model with other weights"


@pytest.fixture
def folder(tmp_path):
    vk.save_plugins(tiny.patched(ratio=2), tmp_path)
    return tmp_path


def moved(model, by):
    """Each matrix changed by this share of its size."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight += by * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


def load(model, folder):
    """The warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vk.load_plugins(model, folder)
    return [str(w.message) for w in caught if "weights" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weights_in_any_dtype(folder, dtype):
    assert load(tiny.model().to(dtype), folder) == []
    assert load(tiny.patched().to(dtype), folder) == []


def test_other_weights(folder):
    (message,) = load(moved(tiny.model(), 0.02), folder)
    assert WARNING in message
    share = float(message.split("differ by ")[1].split("%")[0])
    assert 0.5 < share < 8
    (message,) = load(moved(tiny.patched(), 1.0), folder)
    assert float(message.split("differ by ")[1].split("%")[0]) > 50


def test_a_warning_that_is_an_error_changes_nothing(folder):
    model = moved(tiny.model(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=WARNING):
            vk.load_plugins(model, folder)
    vk.patch(model, ratios=(2, 4), bottleneck=6)  # it was not patched


@pytest.mark.parametrize("more", [{"optimize": "encoder"}, {"placements": ("ffn", "attention_kv")}])
def test_patching_moves_no_value(more):
    plain = base_weights.sample(find(tiny.model()), lambda x: x)
    patched = base_weights.sample(find(vk.patch(tiny.model(), 2, (2,), **more)), lambda x: x)
    assert plain == patched and len(plain) == 2


def test_layers_that_cannot_be_read_are_left_out(folder):
    model = tiny.model()
    block = find(model).blocks[0]
    block.to("meta")
    assert list(base_weights.sample(find(model), lambda x: x)) == ["1"]
    assert base_weights.difference({"0": [1.0]}, {"0": [1.0, 2.0], "1": [3.0]}) == 0


def test_a_folder_that_does_not_say(folder):
    settings = json.loads((folder / "plugins.json").read_text())
    assert sorted(settings["base"]) == ["0", "1"]
    edit_settings(base={})(folder)
    assert load(moved(tiny.model(), 1.0), folder) == []


@pytest.mark.parametrize("base", [3, [], {"0": 1.0}, {"0": ["x"]}, {"0": [float("nan")]}])
def test_refuses_what_is_no_sample(folder, base):
    edit_settings(base=base)(folder)
    with pytest.raises(ValueError, match="base must hold lists of finite numbers"):
        vk.load_plugins(tiny.model(), folder)
