"""vk.Plan: a level in every place that takes one, and a file that says what it is."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.runtime.plan import Plan
from variator_kernels.runtime.site import Site

SITES = (Site("ffn", 0), Site("ffn", 1), Site("attention_kv", 0), Site("attention_kv", 1))
PLAN = Plan(SITES, (1, 4, 2, 1), "cost", 0.5, "flops", 0.49, 0.48, 0.0125)
TABLE = """\
cost=0.5 by flops: cost 0.480 of the dense encoder's (predicted 0.490), loss 0.0125
layer  ffn  attention_kv
    0    1             2
    1    4             1"""


def model(ratio=1, **settings):
    made = tiny.model("bert", "gelu", **settings)
    vk.patch(made, ratio, (2, 4), 6, placements=("ffn", "attention_kv"))
    tiny.train_plugins(made)
    return made


def test_is_a_value():
    assert hash(PLAN) == hash(copy.deepcopy(PLAN))
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN != dataclasses.replace(PLAN, loss=0.5)
    assert str(PLAN) == TABLE
    with pytest.raises(AttributeError):
        PLAN.loss = 0.0


def test_a_layer_without_a_site_has_no_number():
    sites = (Site("ffn", 0), Site("ffn", 1), Site("attention_kv", 1))
    lines = str(Plan(sites, (2, 1, 4), "loss", 0.1, "time", 0.5, 0.5, 0.1)).splitlines()
    assert lines[2:] == ["    0    2             -", "    1    1             4"]


BAD = [
    ({"ratios": (1, 4, 2)}, "one for each of 4 sites, got 3"),
    ({"ratios": (1, 4, 2, 0)}, "integers >= 1, got 0"),
    ({"ratios": (1, 4, 2, True)}, "integers >= 1, got True"),
    ({"ratios": (1, 4, 2, np.int64(2))}, "integers >= 1"),
    ({"sites": ()}, "sites must be those of a model"),
    ({"sites": (SITES[0],) * 4}, "each site once"),
    ({"asked": "time"}, "asked must be one of"),
    ({"measure": "cost"}, "measure must be one of"),
    ({"loss": float("nan")}, "loss must be a finite float >= 0, got nan"),
    ({"cost": -1.0}, "cost must be a finite float >= 0, got -1.0"),
    ({"limit": "1"}, "limit must be a finite float >= 0, got '1'"),
    ({"cost": 0.51}, "cost must be at most 0.5, which cost=0.5 asks for, got 0.51"),
    ({"asked": "speedup", "limit": 2.1}, "cost must be at most 0.476.*speedup=2.1.*got 0.48"),
    ({"asked": "speedup", "limit": 0.9}, "limit must be >= 1 for a speedup, got 0.9"),
    ({"limit": 0.0}, "limit must be above 0, at most 1 for a cost, got 0.0"),
    ({"limit": 1.5}, "limit must be above 0, at most 1 for a cost, got 1.5"),
    ({"asked": "loss", "limit": 0.01}, "loss must be at most its limit 0.01, got 0.0125"),
    (
        {"sites": (*SITES[:2], Site("attention", 1), SITES[3])},
        r"both 'attention' and 'attention_kv' of one layer, got them in \[1\]",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{**vars(PLAN), **changes})


def test_is_a_level():
    made = model()
    ids, mask = tiny.batch(13, 7)
    with vk.use_ratio(made, {"ffn": {1: 4}, "attention_kv": {0: 2}}):
        wanted = tiny.encode(made, ids, mask)
    with vk.use_ratio(made, PLAN):
        assert torch.equal(tiny.encode(made, ids, mask), wanted)
    assert not torch.equal(tiny.encode(made, ids, mask), wanted)
    vk.set_ratio(made, PLAN)
    assert torch.equal(tiny.encode(made, ids, mask), wanted)
    assert "'ffn': {1: 4}, 'attention_kv': {0: 2}" in vk.describe(made)


def test_patches_as_a_ratio():
    made = vk.patch(tiny.model("bert", "gelu"), PLAN, ratios=(3,), bottleneck=6)
    assert made.encoder.layer[0].variator_state.method.placements == {
        "ffn": (3, 4),
        "attention_kv": (2, 3),
    }
    vk.unpatch(made)
    with pytest.raises(ValueError, match=r"a plan for the model's own sites, ffn 0 to 2"):
        vk.patch(tiny.model("bert", "gelu", num_layers=3), PLAN)
    with pytest.raises(ValueError, match="placements must hold those that ratio and ratios name"):
        vk.patch(made, PLAN, placements=("ffn", "attention"))


def test_counts(tmp_path):
    by_layer = {"ffn": {1: 4}, "attention_kv": {0: 2}}
    for made in (model(), tiny.model("bert", "gelu")):
        assert vk.flops.count(made, 2, 31, PLAN) == vk.flops.count(made, 2, 31, by_layer)


def test_travels_with_the_plugins(tmp_path):
    made = model(PLAN)
    vk.save_plugins(made, tmp_path)
    other = tiny.model("bert", "gelu")
    vk.load_plugins(other, tmp_path)
    ids, mask = tiny.batch(13, 7)
    assert torch.equal(tiny.encode(other, ids, mask), tiny.encode(made, ids, mask))
    assert vk.describe(other).splitlines()[4] == vk.describe(made).splitlines()[4]


def test_is_refused_for_other_sites():
    with pytest.raises(ValueError, match="this one has no ratio for ffn 2, attention_kv 2"):
        vk.set_ratio(model(num_layers=3), PLAN)
    with pytest.raises(ValueError, match="this one has ratios for ffn 1, attention_kv 1"):
        vk.set_ratio(model(num_layers=1), PLAN)
    ffn = vk.patch(tiny.model("bert", "gelu"), 4, (2, 4), 6)
    with pytest.raises(ValueError, match="sites, ffn 0 to 1, this one has ratios for attention"):
        vk.set_ratio(ffn, PLAN)
    turned = Plan(SITES[::-1], (1, 1, 2, 2), "cost", 0.5, "flops", 0.5, 0.5, 0.0)
    with pytest.raises(ValueError, match="in another order"):
        vk.set_ratio(model(), turned)
    with pytest.raises(ValueError, match=r"one that has plugins for 'ffn', \(2, 4\), got 8"):
        vk.set_ratio(model(), Plan(SITES, (1, 8, 2, 1), "cost", 0.5, "flops", 0.5, 0.5, 0.0))


def test_saves_and_draws(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert json.loads(path.read_text())["level"] == {
        "ffn": {"0": 1, "1": 4},
        "attention_kv": {"0": 2, "1": 1},
    }
    PLAN.draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.png"]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Plan.load(tmp_path)


def changed(**changes):
    fields = {"format": 1, "written_by": "0.2.0", "asked": "cost", "limit": 0.5}
    fields |= {"measure": "flops", "predicted_cost": 1, "cost": 0.5, "loss": 0.1}
    fields |= {"level": {"ffn": {"0": 2}}, **changes}
    return {name: value for name, value in fields.items() if value is not None}


BROKEN = [
    ("[1]", "it must hold a mapping, got list"),
    ("{", "Expecting"),
    ("\udcff", "codec can't decode"),
    ('{"format": 1, "format": 1}', "'format' twice"),
    ("[" * 100_000, "recursion"),
    (changed(format=2, written_by="0.9"), "format 2, this version reads format 1: it was written "),
    (changed(format=2, written_by="0.9"), "by variator_kernels 0.9, use that version"),
    (changed(width=2, written_by="0.9"), r"fields \['width'\].* by variator_kernels 0.9"),
    (changed(format=True), "format True"),
    (changed(loss=None), r"lacks the fields \['loss'\]"),
    (changed(loss="0.1"), "loss must be a finite float"),
    (changed(loss=True), "loss must be a finite float"),
    (changed(loss=10**400), "loss must be a finite float"),
    (changed(loss=float("nan")), "loss must be a finite float"),
    (changed(asked=[1]), "asked must be a word"),
    (changed(written_by=1), "written_by must be a version"),
    (changed(level={"ffn": {"-1": 2}}), "layers by numbers, got '-1'"),
    (changed(level={"ffn": {"0": 2, "00": 2}}), "name layers by numbers"),
    (changed(level={"ffn": {"0": 2.0}}), "integers >= 1, got 2.0"),
    (changed(level={"ffn": {"0": 0}}), "integers >= 1, got 0"),
    (changed(level={"ffn": {}}), "ratios of layers"),
    (changed(level={}), "sites must be those of a model"),
    (changed(level={"keys": {"0": 2}}), "placements among"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_refuses_broken_files(content, message, tmp_path):
    path = tmp_path / "plan.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as refused:
        Plan.load(path)
    assert "holds no plan that can be read" in str(refused.value)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(changed())), JUNK)
def test_reads_or_refuses_anything(tmp_path_factory, field, junk):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    path.write_text(json.dumps({**changed(), field: junk}))
    try:
        plan = Plan.load(path)
    except ValueError:
        return
    plan.save(path)
    assert Plan.load(path) == plan
