"""Levels: which ratio holds at which site, in every form that a user may give."""

import numpy as np
import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.runtime.level import Level, resolve
from variator_kernels.runtime.site import Site
from variator_kernels.runtime.state import observe, states

SITES = tuple(Site("ffn", layer) for layer in range(4))
AVAILABLE = {"ffn": (2, 4)}

GOOD = [
    (2, (2, 2, 2, 2)),
    (np.int64(4), (4, 4, 4, 4)),
    ({"ffn": 4}, (4, 4, 4, 4)),
    ({"ffn": {0: 2, -1: 4}}, (2, 1, 1, 4)),
    ({"ffn": {1: 1}}, (1, 1, 1, 1)),
    ({}, (1, 1, 1, 1)),
    (Level((1, 2, 4, 1)), (1, 2, 4, 1)),
]


@pytest.mark.parametrize(("value", "ratios"), GOOD)
def test_forms(value, ratios):
    level = resolve(value, SITES, AVAILABLE)
    assert level.ratios == ratios
    assert level.is_dense == (set(ratios) == {1})
    assert level.uniform == (ratios[0] if len(set(ratios)) == 1 else None)
    assert resolve(level, SITES, AVAILABLE) == level


BAD = [
    (3, r"ratio must be 1 \(dense\) or one that has plugins, \(2, 4\), got 3"),
    ({"attention": 2}, r"placements of the model, \('ffn',\), got 'attention'"),
    ({"ffn": 3}, r"ratio\['ffn'\] must be 1 \(dense\) or one that has plugins, \(2, 4\), got 3"),
    ({"ffn": {4: 2}}, r"ratio\['ffn'\] must name layers as integers from -4 to 3, got 4"),
    ({"ffn": {-5: 2}}, "from -4 to 3, got -5"),
    ({"ffn": {"0": 2}}, "from -4 to 3, got '0'"),
    ({"ffn": {True: 2}}, "from -4 to 3, got True"),
    ({"ffn": {3: 2, -1: 4}}, "must name a layer once, got -1 for 3 again"),
    ({"ffn": {0: 0}}, "must be >= 1, got 0"),
    (Level((2, 2)), "a level of 4 sites, got one of 2"),
    (Level((2, 2, 2, 3)), "got 3"),
    ([2, 2, 2, 2], r"ratio must be an integer >= 1, got \[2, 2, 2, 2\]"),
]


@pytest.mark.parametrize(("value", "message"), BAD)
def test_refuses(value, message):
    with pytest.raises(ValueError, match=message):
        resolve(value, SITES, AVAILABLE)


@pytest.mark.parametrize("family", ["t5", "bert", "distilbert"])
def test_layers_of_their_own(family):
    """Only the named layer is compressed: below it the model is dense, bit for bit."""
    model = tiny.patched(family, "gelu")
    ids, mask = tiny.batch(9, 4)
    (state,) = states(model)
    outputs, inputs = {}, {}
    for level in (1, 2, {"ffn": {-1: 2}}, {"ffn": {0: 2}}, {"ffn": {0: 2, 1: 2}}):
        seen = inputs.setdefault(str(level), [])
        watch = observe(state, lambda layer, x, mask, k, seen=seen: seen.append((x[mask], k)))
        with watch, vk.use_ratio(model, level), torch.no_grad():
            outputs[str(level)] = tiny.encode(model, ids, mask)
    dense, both, last, first, named = outputs.values()
    assert torch.equal(both, named)
    of_dense, of_both, of_last, of_first, _ = inputs.values()
    assert [k for _, k in of_last] == [1, 2] and [k for _, k in of_first] == [2, 1]
    assert torch.equal(of_dense[1][0], of_last[1][0])
    assert torch.equal(of_both[1][0], of_first[1][0])
    for a, b in ((dense, last), (dense, first), (last, first), (last, both), (first, both)):
        assert not torch.allclose(a, b, atol=1e-4)


def test_patches_at_a_level():
    model = vk.patch(tiny.model(), ratio={"ffn": {-1: 3}}, ratios=())
    state = model.encoder.variator_state
    assert state.ratios == (3,) and state.level.ratios == (1, 3) and state.ratio is None
    with pytest.raises(ValueError, match=r"got 3"):
        vk.patch(tiny.model(), ratio={"ffn": {3: 3}})
    with pytest.raises(ValueError, match="ratio must be an integer"):
        vk.patch(tiny.model(), ratio=[3])


def test_a_level_is_saved(tmp_path):
    model = tiny.patched(ratio={"ffn": {0: 4}})
    vk.save_plugins(model, tmp_path)
    other = tiny.model()
    vk.load_plugins(other, tmp_path)
    assert other.encoder.variator_state.level == model.encoder.variator_state.level


def test_is_counted():
    model = tiny.patched()
    whole = vk.flops.count(model, 2, 9, 2)
    half = vk.flops.count(model, 2, 9, {"ffn": {0: 2}})
    dense = vk.flops.count(model, 2, 9, 1)
    assert 2 * half.multiply_adds.ffn == whole.multiply_adds.ffn + dense.multiply_adds.ffn
    assert 2 * half.multiply_adds.merge == whole.multiply_adds.merge > 0
    assert 2 * half.parameters.decompress == whole.parameters.decompress > 0


def test_training_of_one_level_trains_its_sites_alone(tmp_path):
    from variator_kernels.train import DistillationConfig, DistillationTrainer

    model = tiny.patched(ratio={"ffn": {0: 4}})
    trainer = DistillationTrainer(
        model, DistillationConfig(output_dir=str(tmp_path), sample_ratios=False)
    )
    first = {id(p) for p in tiny.layers(model)[0].plugins["4"].parameters()}
    assert trainer.ratios == ("mixed",) and {id(p) for p in trainer.trained} == first
    vk.set_ratio(model, 1)
    with pytest.raises(ValueError, match=r"at some site, got 1 \(dense\)"):
        DistillationTrainer(
            model, DistillationConfig(output_dir=str(tmp_path), sample_ratios=False)
        )
