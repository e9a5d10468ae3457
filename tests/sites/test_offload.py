"""Weights that are not there: on the meta device, or shown by accelerate to one forward alone."""

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.sites import tiny

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")


def model(variant):
    return tiny.model(*variant, head=tiny.bare(variant[0])).requires_grad_(False)


def on_meta(variant):
    with torch.device("meta"):
        made = type(model(variant))(tiny.config(*variant))
    return made


def offloaded(made, how, folder):
    if how == "cpu_offload":
        accelerate.cpu_offload(made, execution_device=CPU)
    elif how == "disk_offload":
        accelerate.disk_offload(made, str(folder), execution_device=CPU)
    elif how == "dispatch_model":
        accelerate.dispatch_model(made, {"": "cpu"}, force_hooks=True)
    else:
        names = [name for name, _ in made.named_children()]
        places = dict.fromkeys(names, "disk") | {names[0]: "cpu"}
        accelerate.dispatch_model(made, places, offload_dir=str(folder), main_device="cpu")


OFFLOADS = ["cpu_offload", "disk_offload", "dispatch_model", "device_map"]
REFUSED = r"accelerate's hook is on .*remove_hook_from_submodules"


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("how", OFFLOADS)
def test_offloaded_models_are_refused(variant, how, tmp_path):
    made = model(variant)
    ids, mask = tiny.batch(9, 4)
    dense = made(ids, attention_mask=mask)[0]
    offloaded(made, how, tmp_path / "before")
    before = tiny.snapshot(made)
    with pytest.raises(ValueError, match=REFUSED):
        vk.patch(made)
    assert tiny.snapshot(made) == before
    made = model(variant)
    vk.patch(made, ratio=2, ratios=(2,), bottleneck=6)
    tiny.train_plugins(made)
    compressed = made(ids, attention_mask=mask)[0]
    offloaded(made, how, tmp_path / "after")
    with pytest.raises(ValueError, match=REFUSED):
        made(ids, attention_mask=mask)
    with vk.use_ratio(made, 1):
        assert torch.equal(made(ids, attention_mask=mask)[0], dense)
    assert vk.flops.count(made, ratio=2) == vk.flops.count(model(variant), ratio=2, bottleneck=6)
    accelerate.hooks.remove_hook_from_submodules(made)
    if not any(p.is_meta for p in made.parameters()):  # disk_offload does not bring all back
        assert torch.equal(made(ids, attention_mask=mask)[0], compressed)
        vk.unpatch(made)
        assert torch.equal(made(ids, attention_mask=mask)[0], dense)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_what_a_removed_hook_leaves_behind(variant):
    made, expected = model(variant), tiny.patched(*variant, head=tiny.bare(variant[0]), ratio=2)
    ids, mask = tiny.batch(9, 4)
    dense = made(ids, attention_mask=mask)[0]
    accelerate.dispatch_model(made, {"": "cpu"}, force_hooks=True)
    accelerate.hooks.remove_hook_from_submodules(made)
    vk.patch(made, ratio=2, ratios=(2, 4), bottleneck=6, keep_first=0)
    tiny.train_plugins(made)
    with torch.no_grad():
        wanted = expected(ids, attention_mask=mask)[0]
        assert torch.equal(made(ids, attention_mask=mask)[0], wanted)
    vk.unpatch(made)
    assert torch.equal(made(ids, attention_mask=mask)[0], dense)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_offloaded_plugins_are_refused(variant):
    made = model(variant)
    vk.patch(made, ratio=2, ratios=(2,), bottleneck=6)
    ids, mask = tiny.batch(9, 4)
    with pytest.warns(UserWarning, match="untrained"):
        made(ids, attention_mask=mask)
    accelerate.cpu_offload(tiny.layers(made)[0].plugins, execution_device=CPU)
    with pytest.raises(ValueError, match=REFUSED):
        made(ids, attention_mask=mask)


def test_plugin_files_of_a_model_without_values(tmp_path):
    vk.save_plugins(tiny.patched(head="EncoderModel", ratio=2), tmp_path / "plugins")
    made = on_meta(("t5", "relu"))
    before = tiny.snapshot(made)
    with pytest.raises(ValueError, match=r"is on the meta device.*weights, then patch it"):
        vk.load_plugins(made, tmp_path / "plugins")
    assert tiny.snapshot(made) == before
    vk.patch(made, ratios=(2, 4), bottleneck=6)
    with pytest.raises(ValueError, match="is on the meta device"):
        vk.load_plugins(made, tmp_path / "plugins")
    for write in (vk.save_plugins, type(made).save_pretrained):
        with pytest.raises(ValueError, match=r"ffn.0.2.merge.weight is on the meta device"):
            write(made, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    ids, mask = tiny.batch(*[6] * 12)
    with pytest.raises(ValueError, match="is on the meta device"):
        vk.calibrate(made, [{"input_ids": ids, "attention_mask": mask}])


def test_a_default_device_without_memory_changes_nothing(tmp_path):
    expected = [p.clone() for p in vk.plugin_parameters(tiny.patched(ratio=2))]
    vk.save_plugins(tiny.patched(ratio=2), tmp_path)
    made = tiny.model()
    with torch.device("meta"):
        vk.load_plugins(made, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(expected, vk.plugin_parameters(made), strict=True))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_flops_need_no_values(variant):
    real, made = model(variant), on_meta(variant)
    assert vk.flops.count(made) == vk.flops.count(real)
    vk.patch(made, ratios=(2, 4))
    assert vk.flops.count(made) == vk.flops.count(real)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("own", [nn.Linear(2, 2), nn.Parameter(torch.ones(2)), [1]])
def test_the_name_of_plugins_must_be_free(variant, own):
    made = model(variant)
    layer = tiny.layers(made)[-1]
    layer.plugins = own
    before = tiny.snapshot(made)
    with pytest.raises(ValueError, match=r"must not have 'plugins'.*rename or remove it"):
        vk.patch(made)
    assert tiny.snapshot(made) == before and layer.plugins is own
