"""Who is told that plugins have their initial values, and who is not."""

import copy
import json
import warnings

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels import checkpoint, description
from variator_kernels.train import DistillationConfig, DistillationTrainer


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


def test_layers_that_are_one_module_count_each():
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


def cut(model):
    model.encoder.layer = model.encoder.layer[:1]


def repeat(model):
    model.encoder.layer[1] = model.encoder.layer[0]


def take_copy(model):
    model.encoder.layer[1] = copy.deepcopy(model.encoder.layer[0])


def unpatch_one(model):
    vk.unpatch(model.encoder.layer[1])


@pytest.mark.parametrize("change", [cut, repeat, take_copy, unpatch_one])
def test_layers_that_went_away_break_no_forward(change):
    model = vk.patch(tiny.model("bert", "gelu"), 4).eval()
    change(model)
    with pytest.warns(UserWarning, match="untrained"):
        tiny.encode(model, *tiny.batch(9))


def test_what_a_look_cannot_tell_is_in_no_file():
    """As with parameters that are sharded: the look sees other types than a file is made of."""
    model, batch = vk.patch_t5(tiny.model(), 4, (4,)).eval(), tiny.batch(9)
    method = tiny.encoder(model).variator_state.method
    real, type(method).is_trained = type(method).is_trained, lambda *_: True
    try:
        silent(model, *batch)
    finally:
        type(method).is_trained = real
    assert checkpoint.gather(model)[0].untrained == {"ffn": {"4": [0, 1]}}


def test_values_that_were_put_back_are_untrained_in_a_file():
    model, batch = vk.patch_t5(tiny.model(), 4, (4,)).eval(), tiny.batch(9)
    initial = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for layer in tiny.layers(model):
            layer.plugins["4"].adapter.b2.fill_(1)  # a bias alone is something, too
    silent(model, *batch)
    assert checkpoint.gather(model)[0].untrained == {}
    model.load_state_dict(initial)
    assert checkpoint.gather(model)[0].untrained == {"ffn": {"4": [0, 1]}}


def test_a_trainer_that_did_nothing_trained_nothing(tmp_path):
    model = vk.patch_t5(tiny.model(), 4, (4,))
    DistillationTrainer(model, DistillationConfig(str(tmp_path), use_cpu=True, report_to="none"))
    assert checkpoint.gather(model)[0].untrained == {"ffn": {"4": [0, 1]}}
    assert dict(description.lines(model))["trained, k=4"] == "no"


def test_calibration_of_neither_part_is_refused():
    model = vk.patch_t5(tiny.model(), 4)
    with pytest.raises(ValueError, match="must not both be False"):
        vk.calibrate(model, [], merge=False, adapter=False)


def test_loading_says_nothing_again_of_other_ratios(tmp_path):
    both, batch = vk.patch_t5(tiny.model(), 4, (2, 4)).eval(), tiny.batch(9)
    with pytest.warns(UserWarning, match="ratio 4"):
        tiny.encode(both, *batch)
    vk.save_plugins(vk.patch_t5(tiny.model(), 2, (2,)), tmp_path)
    vk.load_plugins(both, tmp_path)
    vk.set_ratio(both, 4)
    silent(both, *batch)
    vk.set_ratio(both, 2)
    with pytest.warns(UserWarning, match="ratio 2"):
        tiny.encode(both, *batch)


def test_a_state_of_an_older_version_speaks_again():
    model = vk.patch_t5(tiny.model(), 4)
    state = tiny.encoder(model).variator_state
    old = {k: v for k, v in state.__getstate__().items() if k not in ("fitted", "quiet")}
    state.__setstate__(old | {"trained": {("ffn", 4)}, "warned": True})
    with pytest.warns(UserWarning, match="ratio 4"):
        tiny.encode(model.eval(), *tiny.batch(9))
