"""Two encoders in one model: patched whole, saved whole."""

import pytest
import torch
import transformers
from torch import nn

import variator_kernels as vk
from tests.sites import tiny, zoo
from variator_kernels.sites import install
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PAIRS = [("bert", "bert"), ("mpnet", "modernbert"), ("albert", "bart"), ("deberta", "t5")]


class Two(nn.Module):
    def __init__(self, query, passage):
        super().__init__()
        self.query, self.passage = zoo.plain(query), zoo.plain(passage)
        with torch.no_grad():  # two of a family differ
            for parameter in self.passage.parameters():
                parameter.mul_(0.9)

    def forward(self, ids, mask):
        encoders = [find(m).encoder for m in (self.query, self.passage)]
        return [encoder(ids, attention_mask=mask)[0] for encoder in encoders]


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_patched_and_saved_whole(pair, tmp_path):
    model, other = Two(*pair), Two(*pair)
    ids, mask = tiny.batch(9, 4)
    dense, before = model(ids, mask), tiny.snapshot(model)
    vk.patch(model, ratio=2, ratios=(2, 4), bottleneck=6)
    tiny.train_plugins(model)
    compressed = model(ids, mask)
    for a, b in zip(dense, compressed, strict=True):
        assert not torch.allclose(a, b, atol=1e-3)
    with vk.use_ratio(model, 1):
        assert all(map(torch.equal, model(ids, mask), dense))
    vk.save_plugins(model, tmp_path)
    folders = {path.parent for path in tmp_path.rglob("plugins.json")}
    assert len(folders) == 2 and tmp_path not in folders
    vk.load_plugins(other, tmp_path)
    assert all(map(torch.equal, other(ids, mask), compressed))
    vk.load_plugins(model, tmp_path)
    assert all(map(torch.equal, model(ids, mask), compressed))
    assert vk.describe(model).count("family ") == 2
    for function in (vk.flops.count, lambda m: vk.calibrate(m, [])):
        with pytest.raises(ValueError, match=r"got 2 in a Two.*call this for each of them"):
            function(model)
    vk.unpatch(model)
    assert tiny.snapshot(model) == before
    assert all(map(torch.equal, model(ids, mask), dense))


def test_one_of_them_alone():
    model = Two("bert", "mpnet")
    vk.patch(model.query, ratio=2)
    assert vk.describe(model).count("family ") == 1
    with pytest.raises(ValueError, match="already patched"):
        vk.patch(model)


def test_nothing_is_loaded_by_half(tmp_path):
    model = vk.patch(Two("bert", "bert"), ratio=2, ratios=(2,), bottleneck=6)
    vk.save_plugins(model, tmp_path)
    (tmp_path / "passage" / "plugins.json").write_text("{}")
    fresh = Two("bert", "bert")
    before = tiny.snapshot(fresh)
    with pytest.raises(ValueError, match="damaged"):
        vk.load_plugins(fresh, tmp_path)
    assert tiny.snapshot(fresh) == before
    (tmp_path / "passage" / "plugins.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*passage"):
        vk.load_plugins(fresh, tmp_path)
    assert tiny.snapshot(fresh) == before


def test_a_failure_in_the_second_undoes_the_first(monkeypatch):
    model = Two("bert", "mpnet")
    before, real = tiny.snapshot(model), install.patched_class

    def fails(family, name):
        if family.name == "mpnet":
            raise MemoryError
        return real(family, name)

    monkeypatch.setattr(install, "patched_class", fails)
    with pytest.raises(MemoryError):
        vk.patch(model)
    assert tiny.snapshot(model) == before
    assert not any("variator" in name for m in model.modules() for name in vars(m))


@pytest.mark.parametrize("name", ["mpnet", "albert"])
def test_the_text_side_of_a_dual_encoder(name, tmp_path):
    vision = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, zoo.config(name)
    )
    model = transformers.VisionTextDualEncoderModel(config).eval()
    ids, mask = tiny.batch(9, 4)
    with torch.no_grad():
        dense = model.get_text_features(ids, attention_mask=mask)
        vk.patch(model, 2, (2,), 6, keep_first=0)  # the first token is pooled
        tiny.train_plugins(model)
        out = model.get_text_features(ids, attention_mask=mask)
    dense, out = (getattr(o, "pooler_output", o) for o in (dense, out))
    assert not torch.allclose(dense, out, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = transformers.VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
    vk.load_plugins(again, tmp_path)
    with torch.no_grad():
        loaded = again.get_text_features(ids, attention_mask=mask)
    torch.testing.assert_close(getattr(loaded, "pooler_output", loaded), out)


@pytest.mark.parametrize("name", ["bart", "albert", "modernbert", "deberta", "led"])
def test_calibration_runs_blocks_of_every_kind(name):
    model = vk.patch(zoo.plain(name), 2, (2,), 6)
    ids, mask = tiny.batch(9, 4, 7, 8, 9, 9, 5, 6, 9, 9, 9, 9)
    batch = {"input_ids": ids, "attention_mask": mask}
    encoder = find(model).encoder
    before = vk.plugin_parameters(model)[0].clone()
    assert vk.calibrate(model, [batch] * 3) is not None
    assert encoder(ids, attention_mask=mask)[0].isfinite().all()
    changed = [p for p in vk.plugin_parameters(model) if p.any()]
    assert changed and before.shape == vk.plugin_parameters(model)[0].shape
