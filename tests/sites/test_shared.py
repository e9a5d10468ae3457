"""Layers that are one module have one set of plugins, saved once, counted at every use."""

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.sites.family import follow
from variator_kernels.sites.find import find


def shared(family):
    """The second of three layers is the first."""
    model = tiny.model(family, "gelu" if family in tiny.BERTS else "relu", num_layers=3)
    found = find(model)
    follow(found.encoder, found.family.blocks)[1] = found.blocks[0]
    return model


@pytest.mark.parametrize("family", ["t5", "bert", "distilbert"])
def test_one_set_of_plugins(family, tmp_path):
    model = shared(family)
    before = tiny.snapshot(model)
    ids, mask = tiny.batch(9, 4)
    dense = tiny.encode(model, ids, mask)
    vk.patch(model, ratio=2, ratios=(2, 4), bottleneck=6)
    tiny.train_plugins(model)
    found = find(model)
    assert [i for i, _ in found.own_layers] == [0, 2]
    assert len(vk.plugin_parameters(model, [2])) == 2 * 6
    compressed = tiny.encode(model, ids, mask)
    assert not torch.allclose(dense, compressed, atol=1e-3)
    vk.save_plugins(model, tmp_path)
    other = shared(family)
    vk.load_plugins(other, tmp_path)
    assert torch.equal(tiny.encode(other, ids, mask), compressed)
    with pytest.raises(ValueError, match=r"missing keys \['ffn.1"):
        vk.load_plugins(tiny.model(family, "gelu", num_layers=3), tmp_path)
    vk.unpatch(model)
    assert tiny.snapshot(model) == before
    assert torch.equal(tiny.encode(model, ids, mask), dense)


def test_their_ratio_is_one():
    model = vk.patch(shared("t5"))
    vk.set_ratio(model, {"ffn": {0: 2, 1: 2}})
    for level, got in (({"ffn": {0: 2}}, "2 and 1"), ({"ffn": {0: 2, 1: 4, 2: 4}}, "2 and 4")):
        with pytest.raises(ValueError, match=f"layers 0 and 1, which are one module, got {got}"):
            vk.set_ratio(model, level)
    assert model.encoder.variator_state.level.ratios == (2, 2, 1)


def test_cost():
    alone, together = tiny.model(num_layers=3), shared("t5")
    a, b = (vk.flops.count(model, 2, 9, 2) for model in (alone, together))
    assert a.multiply_adds == b.multiply_adds
    for name in ("ffn", "attention_projections", "merge", "decompress"):
        assert 2 * getattr(a.parameters, name) == 3 * getattr(b.parameters, name) > 0
    assert b.dense_parameters.total == sum(p.numel() for p in find(together).encoder.parameters())
