"""Families of users' own: the example of docs/families.md, and what is refused."""

import copy
import dataclasses
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny, zoo
from variator_kernels.sites.decoder_families import DECODER_FAMILIES
from variator_kernels.sites.families import BART_FAMILIES, BERT_FAMILIES, FAMILIES, T5_FAMILIES

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The module that the code of the documentation is."""
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    module = types.ModuleType("variator_families_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, str(DOCS), "exec"), vars(module))
    return module


def patched(example, ratio=4, **settings):
    torch.manual_seed(1)
    model = example.Encoder().eval()
    vk.patch(model, ratio, (2, 4), 6, family=example.family, **settings)
    tiny.train_plugins(model)
    return model


def test_the_example_runs(example):
    out = example.other(example.ids, attention_mask=example.mask)
    assert torch.equal(out, example.compressed)
    dense = example.model(example.ids, attention_mask=example.mask)
    assert not torch.allclose(dense, out, atol=1e-3)
    assert not any("variator" in name for m in example.model.modules() for name in vars(m))


@torch.no_grad()
def test_everything_works_with_it(example):
    model, ids, mask = patched(example), example.ids, example.mask
    out = model(ids, attention_mask=mask)
    torch.testing.assert_close(model(ids[1:, :6], mask[1:, :6]), out[1:, :6], atol=1e-5, rtol=1e-4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids, mask), out)
        assert "family        my-encoder, hidden size 32" in vk.describe(twin)
        assert vk.flops.count(twin, 2, 10).fraction_left < 1
    exported = torch.export.export(model, (ids, mask))
    torch.testing.assert_close(exported.module()(ids, mask), out, atol=1e-5, rtol=1e-4)
    kept = patched(example, keep=(5,))
    assert kept(ids, mask).isfinite().all()
    reference = patched(example, backend="reference")
    torch.testing.assert_close(reference(ids, mask), out, atol=1e-5, rtol=1e-4)
    vk.calibrate(model, [{"input_ids": ids, "attention_mask": mask}] * 6)


def test_moved_weights_are_found(example):
    """A fused matrix is seen through views, which must not outlive it."""
    model, ids, mask = patched(example), example.ids, example.mask
    with torch.no_grad():
        first = model(ids, mask)
        for block in model.blocks:
            block.ffn.both.weight.data = block.ffn.both.weight.data * 2
        second = model(ids, mask)
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(ids, mask), second) and not torch.allclose(first, second, atol=1e-3)
        assert model.double()(ids, mask).dtype == torch.float64
    model.float()(ids, mask).square().mean().backward()
    assert all(block.ffn.both.weight.grad.abs().sum() > 0 for block in model.blocks)
    both = model.blocks[0].ffn.both.weight
    both.requires_grad_(False)
    model(ids, mask)
    both.requires_grad_(True).grad = None
    model(ids, mask).square().mean().backward()
    assert both.grad.abs().sum() > 0


WRONG = [
    ({"blocks": "layers"}, r"family.blocks is 'layers': .*no attribute 'layers'"),
    ({"block": "Encoder"}, r"block 0 must have a Encoder \(family.block.*got .*Block"),
    ({"layer": "Block", "steps": ("both",), "sublayer": ""}, r"has no 'both' \(family.steps\)"),
    ({"sublayer": "mlp"}, r"family.sublayer is 'mlp': .*no attribute 'mlp'"),
    ({"layer": "Other"}, r"must have a Other \(family.layer"),
    ({"w_in": "wi"}, r"none of \('wi',\) \(family.w_in\): its GatedFFN has \['norm', 'both'"),
    ({"w_out": "wo"}, r"no 'wo' \(family.w_out\)"),
    ({"act": "gelu"}, r"no 'gelu' \(family.act\)"),
    ({"norm": "ln"}, r"no 'ln' \(family.norm\)"),
    ({"norm_class": "RMSNorm"}, r"plain RMSNorm, got torch.*LayerNorm"),
    ({"bypassed": ("ln",)}, r"no 'ln' \(family.bypassed\)"),
    ({"mask": "mask"}, r"no argument 'mask' \(family.mask\).*\['input_ids', 'attention_mask'\]"),
    ({"module": "nowhere"}, "needs nowhere, which cannot be imported"),
    ({"module": "transformers.models.nowhere"}, r"transformers [\d.]+ is installed, another"),
    ({"encoder": "Model"}, "exactly one encoder of a known family.*got 0 in a Encoder"),
    ({"fused": "gate_in"}, "does not describe what GatedFFN of block 0 computes.*fused"),
    ({"norm": "", "bypassed": ()}, "does not describe"),
    ({"residual": False}, "does not describe"),
    ({"post_norm": True}, "does not describe"),
    ({"act": "", "activation": "relu"}, "does not describe"),
    ({"fused": "", "w_gate": ""}, "does not fit GatedFFN of block 0"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_refuses_what_is_not_there(example, change, message):
    family = dataclasses.replace(example.family, **change)
    model = example.Encoder()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        vk.patch(model, family=family)
    assert tiny.snapshot(model) == before and model.training
    vk.patch(model, family=example.family)


FIELDS = [
    ({"name": ""}, ValueError, "family.name must not be empty"),
    ({"w_in": ()}, ValueError, "family.w_in must name a path"),
    ({"w_in": 3}, TypeError, "family.w_in must be a tuple of str, got 3"),
    ({"blocks": None}, TypeError, "family.blocks must be a str, got None"),
    ({"post_norm": 1}, TypeError, "family.post_norm must be a bool, got 1"),
    ({"keep_first": -1}, TypeError, "family.keep_first must be an integer >= 0, got -1"),
    ({"fused": "both"}, ValueError, r"family.fused must be one of .*got 'both'"),
    ({"norm_kind": "batch"}, ValueError, r"family.norm_kind must be one of .*got 'batch'"),
    ({"activation": "silu"}, ValueError, "either act.*or activation"),
    ({"act": ""}, ValueError, "either act.*or activation"),
    ({"w_gate": "gate"}, ValueError, "family.w_gate must be empty where fused"),
    ({"norm": "", "post_norm": True}, ValueError, "family.norm must be a path"),
    ({"layer": "Block", "sublayer": ""}, ValueError, "family.steps must name the FFN's modules"),
    ({"called": ("both",)}, ValueError, "family.called is for an FFN that is no module"),
]


@pytest.mark.parametrize(("change", "kind", "message"), FIELDS)
def test_refuses_fields_that_do_not_fit(example, change, kind, message):
    with pytest.raises(kind, match=message):
        dataclasses.replace(example.family, **change)


def test_refuses_what_is_no_family(example):
    with pytest.raises(TypeError, match=r"family must be a vk.Family, got str"):
        vk.patch(example.Encoder(), family="bert")
    with pytest.raises(ValueError, match="got 0 in a Encoder"):
        vk.load_plugins(example.Encoder(), "my-plugins")


@pytest.mark.parametrize("name", ["bart", "albert", "deberta", "modernbert", "esm", "t5"])
def test_the_tables_rows_describe_what_they_say(name):
    """The comparison that families of users' own go through."""
    family = dataclasses.replace(FAMILIES[name], name="mine")
    model = zoo.plain(name).train()
    modes = [module.training for module in model.modules()]
    vk.patch(model, family=family)
    assert [m.training for n, m in model.named_modules() if "plugins" not in n] == modes


def test_the_documentation_lists_the_table():
    listed = re.search(r"<!-- families -->\n(.*?)<!-- /families -->", DOCS.read_text(), re.DOTALL)[
        1
    ]
    assert set(re.findall(r"`([^`]+)`", listed)) == set(FAMILIES)
    groups = (T5_FAMILIES, BERT_FAMILIES, DECODER_FAMILIES, BART_FAMILIES)
    for line, group in zip(listed.strip().splitlines()[2:], groups, strict=True):
        assert re.findall(r"`([^`]+)`", line) == [family.name for family in group]


class OwnAttention(torch.nn.Module):
    def __init__(self, d):
        super().__init__()
        self.size = d // 2
        self.norm = torch.nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(d, d) for _ in range(4))

    def forward(self, x, padding) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        made = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=~padding[:, None, None]
        )
        return x + self.o(made.transpose(1, 2).flatten(-2))


class OwnBlock(torch.nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attention, self.ffn = OwnAttention(d), OwnFFN(d)

    def forward(self, x, padding):
        return self.ffn(self.attention(x, padding))


class OwnFFN(torch.nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.act = torch.nn.LayerNorm(d), torch.nn.GELU()
        self.up, self.down = torch.nn.Linear(d, 2 * d), torch.nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class OwnEncoder(torch.nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=d, vocab_size=50)
        self.embed = torch.nn.Embedding(50, d)
        self.blocks = torch.nn.ModuleList(OwnBlock(d) for _ in range(2))

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask == 0)
        return x


OWN = vk.Family(
    name="own",
    module=__name__,
    encoder="OwnEncoder",
    block="OwnBlock",
    layer="OwnFFN",
    blocks="blocks",
    sublayer="ffn",
    w_in="up",
    w_out="down",
    act="act",
    norm="norm",
    attention=vk.AttentionPaths(
        sublayer="attention",
        layer="OwnAttention",
        q="q",
        k="k",
        v="v",
        o="o",
        head_size="size",
        norm="norm",
    ),
)


@pytest.mark.parametrize("placement", ["attention_kv", "attention"])
@torch.no_grad()
def test_attention_of_ones_own(placement, tmp_path):
    torch.manual_seed(0)
    model = OwnEncoder().eval()
    ids, mask = tiny.batch(9, 4)
    expected = model(ids, mask)
    vk.patch(model, 2, (2,), 4, placements=("ffn", placement), family=OWN)
    tiny.train_plugins(model)
    got = model(ids, mask)
    assert not torch.allclose(got, expected, atol=1e-3)
    vk.save_plugins(model, tmp_path)
    other = OwnEncoder().eval()
    other.load_state_dict(vk.unpatch(model).state_dict())
    vk.load_plugins(other, tmp_path, family=OWN)
    assert torch.equal(other(ids, mask), got)


WRONG = {
    "scale": 1.0,
    "norm": "",
    "residual": False,
    "head_size": "half",
    "q": "k",
    "sublayer": "absent",
}


@pytest.mark.parametrize("field", WRONG)
def test_attention_that_is_said_wrong_is_refused(field):
    torch.manual_seed(0)
    model = OwnEncoder()
    for block in model.blocks:
        block.attention.half = 4
    before = tiny.snapshot(model)
    wrong = dataclasses.replace(OWN.attention, **{field: WRONG[field]})
    family = dataclasses.replace(OWN, attention=wrong)
    with pytest.raises(ValueError, match=r"family\.attention"):
        vk.patch(model, 2, (2,), 4, placements=("attention_kv",), family=family)
    assert tiny.snapshot(model) == before
    assert all(module.training for module in model.modules())


def test_a_family_without_attention_has_no_placement_there():
    family = dataclasses.replace(OWN, attention=None)
    with pytest.raises(ValueError, match=r"placements must be \('ffn',\) for own"):
        vk.patch(OwnEncoder(), 2, (2,), 4, placements=("attention_kv",), family=family)


PLACE = vk.PlacePaths("weight", "boxes", max_distance="most")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"distances": "vectors"}, TypeError, "distances must be DistancePaths, got 'vectors'"),
        ({"places": ("boxes",)}, TypeError, "places must be PlacePaths"),
        ({"places": (PLACE,)}, ValueError, "places need carrier and carrier_class"),
        ({"carrier": "inner"}, ValueError, "carrier_class, which need places"),
        ({"rotary": "turn", "sines": "table"}, ValueError, "must have rotary or sines, got both"),
        ({"global_keys": "size"}, TypeError, "global_keys must be GlobalPaths, got 'size'"),
        (
            {"global_keys": vk.GlobalPaths("size", "norm", "table"), "places": (PLACE,)}
            | {"carrier": "inner", "carrier_class": "Inner"},
            ValueError,
            "global_keys do not go with distances or places",
        ),
        ({"inner": "self"}, ValueError, "inner and inner_class go together"),
    ],
)
def test_fields_that_do_not_fit_together(fields, error, message):
    with pytest.raises(error, match=rf"family\.attention.*{message}"):
        dataclasses.replace(OWN.attention, **fields)
