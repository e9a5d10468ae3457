"""Plugin files of several placements: damaged settings, other models, shared modules."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import variator_kernels as vk
from tests.sites import tiny, zoo
from tests.sites.attention_cases import encode, patched, placed
from variator_kernels.plugin_files import SETTINGS, TENSORS
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore")
IDS, MASK = tiny.batch(9, 4)


def rewritten(folder, **fields):
    """Both copies of the settings, with some fields changed; ``None`` removes one."""
    given = json.loads((folder / SETTINGS).read_text()) | fields
    text = json.dumps({key: value for key, value in given.items() if value is not None})
    (folder / SETTINGS).write_text(text)
    save_file(load_file(folder / TENSORS), folder / TENSORS, {"settings": text})


BAD = [
    {"placements": {"attention": [2, 3], "attention_kv": [2, 3]}},
    {"placements": {"ffn": [2, 3], "attention_kv": []}},
    {"placements": {"ffn": [2, 3], "attention_kv": [2, 2]}},
    {"placements": {"ffn": [2, 3], "attention_kv": [1, 3]}},
    {"placements": {"ffn": [2, 3], "attention_kv": [2, True]}},
    {"placements": {"ffn": [2, 3], "attention_kv": 3}},
    {"placements": {"ffn": [2, 3], "attention_qv": [2, 3]}},
    {"placements": {"ffn": [2, 3]}},
    {"placements": {"ffn": [2, 3], "attention_kv": [2, 5]}},
    {"placements": {"attention_kv": [2, 3], "ffn": [2, 3]}},
    {"placements": {}, "level": {}},
    {"placements": [["ffn", [2, 3]], ["attention_kv", [2, 3]]]},
    {"level": {"ffn": [3, 3]}},
    {"level": {"ffn": [3, 3], "attention_kv": [3]}},
    {"level": {"ffn": [3, 3], "attention_kv": [3, 4]}},
    {"level": {"ffn": [3, 3], "attention_kv": [3, 3.0]}},
    {"level": {"ffn": [3, 3], "attention_kv": [3, 0]}},
    {"level": {"ffn": [3, 3], "attention": [3, 3]}},
    {"level": None},
    {"method": "projected"},
    {"windows": 3},
    {"family": "roberta"},
    {"layers": 3},
    {"bottleneck": 0},
    {
        "placements": {"ffn": [2, 3], "attention": [2, 3]},
        "level": {"ffn": [3, 3], "attention": [3, 3]},
    },
]


@pytest.mark.parametrize("fields", BAD, ids=str)
@pytest.mark.parametrize("fresh", [False, True])
def test_damaged_settings_change_nothing(fields, fresh, tmp_path):
    vk.save_plugins(patched("bert", "ffn", "attention_kv"), tmp_path)
    rewritten(tmp_path, **fields)
    model = zoo.plain("bert") if fresh else patched("bert", "ffn", "attention_kv")
    before, state = tiny.snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"source|must|missing"):
        vk.load_plugins(model, tmp_path)
    assert tiny.snapshot(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("written", "present"),
    [
        (("attention_kv",), ("ffn",)),
        (("attention_kv",), ("attention",)),
        (("attention",), ("attention_kv",)),
        (("ffn",), ("attention",)),
        (("ffn", "attention_kv"), ("ffn",)),
    ],
)
def test_a_model_patched_elsewhere_refuses(written, present, tmp_path):
    vk.save_plugins(patched("bert", *written), tmp_path)
    model = patched("bert", *present)
    expected = encode(model, IDS, MASK)
    with pytest.raises(ValueError, match="the model was patched for"):
        vk.load_plugins(model, tmp_path)
    assert torch.equal(encode(model, IDS, MASK), expected)


@placed
def test_a_model_patched_for_more_keeps_the_rest(placement, tmp_path):
    source = patched("bert", placement)
    with torch.no_grad():
        for parameter in vk.plugin_parameters(source):
            parameter.mul_(-1)
    vk.save_plugins(source, tmp_path)
    model = patched("bert", "ffn", placement)
    vk.load_plugins(model, tmp_path)
    for mine, theirs, other in zip(
        find(model).attentions,
        find(source).attentions,
        find(patched("bert", "ffn", placement)).attentions,
        strict=True,
    ):
        wanted = theirs.plugins.state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in mine.plugins.state_dict().items())
        assert any(not torch.equal(v, wanted[k]) for k, v in other.plugins.state_dict().items())
    with vk.use_ratio(model, {placement: 3}):
        assert torch.equal(encode(model, IDS, MASK), encode(source, IDS, MASK))


def test_families_without_attention_refuse(tmp_path):
    vk.save_plugins(patched("bert", "attention_kv"), tmp_path)
    rewritten(tmp_path, family="convbert")
    model = zoo.plain("convbert")
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"placements must be \('ffn',\) for convbert"):
        vk.load_plugins(model, tmp_path)
    assert tiny.snapshot(model) == before


@placed
def test_shared_modules_are_there_once(placement, tmp_path):
    """ALBERT: three layers of two groups."""
    model = patched("albert", "ffn", placement)
    sites = find(model).encoder.variator_state.own_sites
    assert len(sites) == 4
    vk.save_plugins(model, tmp_path)
    names = {".".join(key.split(".")[:2]) for key in load_file(tmp_path / TENSORS)}
    assert names == {f"{site.placement}.{site.layer}" for _, site in sites}
    loaded = vk.patch(zoo.plain("albert"), 2, (2, 3), 6, placements=("ffn", placement))
    vk.load_plugins(loaded, tmp_path)
    vk.set_ratio(loaded, 3)
    assert torch.equal(encode(loaded, IDS, MASK), encode(model, IDS, MASK))
    ids = [id(p) for p in vk.plugin_parameters(model)]
    assert len(ids) == len(set(ids))
    with pytest.raises(ValueError, match="which are one module"):
        vk.set_ratio(model, {placement: {0: 2, 1: 3}})


@placed
def test_a_heads_whole_model_is_saved_and_read(placement, tmp_path):
    model = patched("bert", "ffn", placement)
    model.save_pretrained(tmp_path)
    plain = type(zoo.plain("bert")).from_pretrained(tmp_path).eval()
    with vk.use_ratio(model, 1):
        assert torch.equal(encode(plain, IDS, MASK), encode(model, IDS, MASK))
    vk.load_plugins(plain, tmp_path)
    assert torch.equal(encode(plain, IDS, MASK), encode(model, IDS, MASK))
