"""Who is told that plugins have their initial values, and who is not."""

import json
import warnings

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels import checkpoint, description


def test_warns_once_while_untrained():
    model = vk.patch_t5(tiny.model())
    ids, mask = tiny.batch(9)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.encode(model, ids, mask)
    model.eval()
    with pytest.warns(UserWarning, match=r"untrained \(ffn of ratio 4\): each .* FFN output"):
        tiny.encode(model, ids, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.encode(model, ids, mask)
        tiny.encode(tiny.patched(), ids, mask)
        dense = vk.patch_t5(tiny.model(), ratio=1)
        tiny.encode(dense, ids, mask)
    both = vk.patch_t5(tiny.model(), {"ffn": 4, "attention_kv": 2})
    with pytest.warns(UserWarning, match=r"\(attention_kv of ratio 2, ffn of ratio 4\)"):
        tiny.encode(both.eval(), ids, mask)


def silent(model, *batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.encode(model, *batch)


def test_warns_of_layers_that_nobody_trained_beside_those_that_somebody_did(tmp_path):
    """Plugins of some layers in a file, then a level that runs others."""
    model, batch = vk.patch_t5(tiny.model(), 1, (2, 4)).eval(), tiny.batch(9)
    with torch.no_grad():
        tiny.layers(model)[1].plugins["4"].adapter.w2.fill_(0.1)
    vk.set_ratio(model, {"ffn": {1: 4}})
    silent(model, *batch)
    vk.set_ratio(model, 4)
    with pytest.warns(UserWarning, match=r"\(ffn of ratio 4 in layer 0\)"):
        tiny.encode(model, *batch)
    silent(model, *batch)
    vk.set_ratio(model, 2)  # of which nothing was said yet
    with pytest.warns(UserWarning, match=r"\(ffn of ratio 2\)"):
        tiny.encode(model, *batch)
    vk.save_plugins(model, tmp_path)
    loaded = tiny.model().eval()
    vk.load_plugins(loaded, tmp_path)
    vk.set_ratio(loaded, {"ffn": {0: 2, 1: 4}})
    with pytest.warns(UserWarning, match=r"\(ffn of ratio 2\)"):
        tiny.encode(loaded, *batch)


def test_layers_that_are_one_module_are_named_each():
    model = tiny.model("bert", "gelu")
    model.encoder.layer[1] = model.encoder.layer[0]
    vk.patch(model, 4).eval()
    with pytest.warns(UserWarning, match=r"untrained \(ffn of ratio 4\)"):
        tiny.encode(model, *tiny.batch(9))


def test_calibrated_plugins_that_kept_their_initial_values_are_no_untrained_ones(tmp_path):
    """In the model, in its file, and in the file's model."""
    model, batch = vk.patch_t5(tiny.model(), 4).eval(), tiny.batch(9)
    rows = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
            for ids in torch.randint(3, 40, (12, 9))]  # fmt: skip
    vk.calibrate(model, rows, passes=0)
    with torch.no_grad():
        for layer in tiny.layers(model):
            for parameter in layer.plugins.parameters():
                parameter.zero_()  # as if nothing had been better
    silent(model, *batch)
    vk.save_plugins(model, tmp_path)
    loaded = tiny.model().eval()
    vk.load_plugins(loaded, tmp_path)
    silent(loaded, *batch)
    assert dict(description.lines(loaded))["trained, k=4"] == "yes"
    vk.save_plugins(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "plugins.json").read_text())["untrained"] == {}


def test_a_file_that_does_not_say_is_believed_where_some_layer_is_trained(tmp_path):
    for trained, warning in ((1, None), (0, "ffn of ratio 4")):
        model = vk.patch_t5(tiny.model(), 4, (4,)).eval()
        with torch.no_grad():
            tiny.layers(model)[1].plugins["4"].adapter.w2.fill_(0.1 * trained)
        settings, tensors = checkpoint.gather(model)
        assert settings.untrained == {"ffn": {"4": [0, 1][: 2 - trained]}}
        checkpoint.write(settings._replace(untrained=None), tensors, tmp_path)
        loaded = tiny.model().eval()
        vk.load_plugins(loaded, tmp_path)
        if warning is None:
            silent(loaded, *tiny.batch(9))
        else:
            with pytest.warns(UserWarning, match=warning):
                tiny.encode(loaded, *tiny.batch(9))
