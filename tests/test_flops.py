"""flops: count, the counter of PyTorch, and the paper's own figures."""

import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels import backends, flops

needs_cpu = pytest.mark.skipif(
    not next(s for s in backends.status() if s.name == "cpu").usable,
    reason="the cpu backend is not built",
)
BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "d_kv": 64}
LARGE = {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "d_kv": 64}


def meta(**sizes):
    with torch.device("meta"):
        return T5EncoderModel(T5Config(**sizes))


@pytest.mark.parametrize(("sizes", "left"), [(BASE, 0.56), (LARGE, 0.55)])
def test_whole_encoders(sizes, left):
    count = vk.flops.count(meta(**sizes), length=512, ratio=4)
    assert count.fraction_left == pytest.approx(left, abs=0.005)
    d, f, n = sizes["d_model"], sizes["d_ff"], 512
    assert count.dense_multiply_adds.ffn == sizes["num_layers"] * n * 2 * d * f
    assert count.multiply_adds.ffn * 4 == count.dense_multiply_adds.ffn
    assert count.multiply_adds.merge == sizes["num_layers"] * n * (4 * d + d)
    assert count.multiply_adds.decompress == sizes["num_layers"] * n * 9 * 64 * d // 4
    for part in ("attention_projections", "attention_core"):
        assert getattr(count.multiply_adds, part) == getattr(count.dense_multiply_adds, part)


def test_bert_base():
    with torch.device("meta"):
        model = BertModel(BertConfig())
    count = vk.flops.count(model, length=512, ratio=4, keep_first=0)
    t5 = vk.flops.count(meta(**BASE), length=512, ratio=4)
    pooler = 768**2
    assert count.multiply_adds.total == t5.multiply_adds.total + pooler
    assert count.dense_multiply_adds.total == t5.dense_multiply_adds.total + pooler


def test_the_papers_section_3_4():
    saved, added = flops.paper_check()
    assert saved == pytest.approx(0.717, abs=0.002)
    assert added == pytest.approx(0.034, abs=0.0005)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_parameters(variant):
    model = tiny.model(*variant, head=tiny.bare(variant[0]))
    dense = sum(p.numel() for p in model.parameters())
    before = flops.count(model, ratio=4, bottleneck=6)
    vk.patch(model, ratios=(4,), bottleneck=6)
    after = flops.count(model, ratio=4)
    assert before == after
    assert after.dense_parameters.total == dense
    assert after.parameters.total == sum(p.numel() for p in model.parameters())


@needs_cpu
@pytest.mark.parametrize("variant", [*tiny.VARIANTS, ("t5", "gelu")])
@pytest.mark.parametrize(("batch", "length", "ratio"), [(1, 8, 4), (3, 9, 4), (2, 5, 2), (2, 7, 1)])
@pytest.mark.parametrize("grad", [False, True])
def test_counter_agrees(variant, batch, length, ratio, grad):
    model = tiny.patched(*variant, attn_implementation="eager")
    ids, _ = tiny.batch(*[length] * batch)
    with vk.use_ratio(model, ratio), torch.set_grad_enabled(grad):
        with FlopCounterMode(display=False) as counter:
            tiny.encode(model, ids)
    count = vk.flops.count(model, batch=batch, length=length, ratio=ratio)
    assert counter.get_total_flops() == 2 * count.multiply_adds.total


@needs_cpu
def test_counter_counts_training():
    model = tiny.patched()
    ids, _ = tiny.batch(8)
    with FlopCounterMode(display=False) as counter:
        tiny.encode(model, ids).sum().backward()
    forward = 2 * vk.flops.count(model, length=8).multiply_adds.total
    assert 2.8 * forward < counter.get_total_flops() < 3.2 * forward


@needs_cpu
def test_counter_knows_packed_input():
    plugin = vk.Plugin(24, 4, 6)
    layer = tiny.model().encoder.block[0].layer[-1]
    ffn = vk.CompressedFFN(layer).feed_forward()
    cu = torch.tensor([0, 4, 12])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vk.functional.compressed_ffn(torch.randn(12, 24), plugin, ffn, cu_seqlens=cu)
    groups = (12 + 2 * 3) // 4
    macs = groups * 2 * 24 * 40 + 12 * 5 * 24 + (24 + groups) * 6 * 24
    assert counter.get_total_flops() == 2 * macs


def test_ragged_rows():
    model = meta(**BASE)
    ragged = vk.flops.count(model, length=[1, 5, 8], ratio=4)
    whole = vk.flops.count(model, batch=3, length=8, ratio=4)
    assert ragged.multiply_adds.ffn * 6 == whole.multiply_adds.ffn * 5
    assert ragged.dense_multiply_adds.ffn * 24 == whole.dense_multiply_adds.ffn * 14
    assert ragged.multiply_adds.attention_core == whole.multiply_adds.attention_core
    assert vk.flops.count(model, length=[]).multiply_adds.total == 0


BAD = [
    ({"ratio": 0}, "ratio must be >= 1, got 0"),
    ({"batch": -1}, "batch must be >= 0, got -1"),
    ({"length": -1}, "length must be >= 0, got -1"),
    ({"length": [4, 2.5]}, "length must be an integer >= 0, got 2.5"),
    ({"bottleneck": 0}, "bottleneck must be >= 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        vk.flops.count(tiny.model(), **arguments)
    with pytest.raises(ValueError, match="encoder of a known family"):
        vk.flops.count(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("patched", [False, True])
def test_quantised_layers_count_as_what_they_stand_for(variant, patched):
    model = tiny.model(*variant, head=tiny.bare(variant[0]))
    if patched:
        vk.patch(model, ratio=2, ratios=(2,), bottleneck=6)
    expected = flops.count(model, ratio=2, bottleneck=6)
    linear = {torch.nn.Linear}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.ao.quantization.quantize_dynamic(model, linear, dtype=torch.qint8)
    assert flops.count(model, ratio=2, bottleneck=6) == expected


LORA = [
    (("t5", "relu"), ["q", "wi", "wo"]),
    (("t5", "gated-gelu"), ["wi_1"]),
    (("bert", "gelu"), ["query", "dense"]),  # the pooler's too
    (("distilbert", "gelu"), ["q_lin", "lin2"]),
    (("electra", "relu"), ["intermediate.dense", "embeddings_project"]),
]


class LowRank(torch.nn.Module):
    """What peft's LoRA layers look like."""

    def __init__(self, base, rank=3):
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        first = torch.nn.Linear(base.in_features, rank, bias=False)
        second = torch.nn.Linear(rank, base.out_features, bias=False)
        self.lora_A = torch.nn.ModuleDict({"default": first})
        self.lora_B = torch.nn.ModuleDict({"default": second})
        self.merged, self.disable_adapters, self.active_adapters = False, False, ["default"]

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        y = self.base_layer(x)
        return y if self.merged else y + self.lora_B["default"](self.lora_A["default"](x))


def add_low_rank(model, targets):
    try:
        import peft
    except ImportError:
        added = []
        for name, module in list(model.named_modules()):
            if any(name == target or name.endswith(f".{target}") for target in targets):
                parent, _, last = name.rpartition(".")
                added.append(LowRank(module))
                setattr(model.get_submodule(parent), last, added[-1])
        return added
    peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=3))
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]


@needs_cpu
@pytest.mark.parametrize(("variant", "targets"), LORA)
def test_low_rank_adapters_count_where_they_run(variant, targets):
    model = tiny.model(*variant, head=tiny.bare(variant[0]), attn_implementation="eager")
    plain = flops.count(model, batch=2, length=9, ratio=4, bottleneck=6, keep_first=0)
    added = add_low_rank(model, targets)
    # The ops' formulas do not know which tokens bypass merge and adapter.
    vk.patch(model, ratio=4, ratios=(4,), bottleneck=6, keep_first=0)
    tiny.train_plugins(model)
    ids, _ = tiny.batch(9, 9)

    def counted(ratio):
        with FlopCounterMode(display=False) as counter, vk.use_ratio(model, ratio), torch.no_grad():
            tiny.encode(model, ids)
        return counter.get_total_flops()

    count = flops.count(model, batch=2, length=9, ratio=4)
    assert counted(4) == 2 * count.multiply_adds.total
    assert counted(1) == 2 * count.dense_multiply_adds.total > 2 * plain.dense_multiply_adds.total
    assert count.parameters.total == sum(p.numel() for p in model.parameters())
    outside = [m for m in added if "embeddings" in targets[-1] and m.in_features == 16]
    beside = sum(p.numel() for m in outside for k, p in m.named_parameters() if "lora" in k)
    pooler = 3 * 48 * (targets[-1] == "dense")
    assert count.dense_parameters.other == plain.dense_parameters.other + beside + pooler
    for module in added:
        if isinstance(module, LowRank):
            module.merged = True
        else:
            module.merge()
    merged = flops.count(model, batch=2, length=9, ratio=4)
    assert merged.multiply_adds == plain.multiply_adds
    assert merged.dense_parameters == count.dense_parameters


KEPT = [
    # keep_first, keep_last, further tokens, and what lies between kept tokens
    (1, 0, (), (12,)),
    (2, 3, (), (8,)),
    (0, 1, (4, 5), (4, 6)),
    (1, 0, (1, 6, 12), (4, 5)),
    (7, 7, (3,), ()),
]


@needs_cpu
@pytest.mark.parametrize(("first", "last", "further", "runs"), KEPT)
@pytest.mark.parametrize("variant", [("t5", "gated-gelu"), ("bert", "gelu")])
@pytest.mark.parametrize("k", [2, 4])
def test_kept_tokens_cost_what_they_cost_in_the_dense_ffn(variant, k, first, last, further, runs):
    """Against the counter: what lies between them by itself, and the dense model for the rest."""
    n, batch = 13, 2
    model = tiny.patched(*variant, ratio=k)
    layer = tiny.layers(model)[0]

    def counted(length, ratio):
        with vk.use_ratio(model, ratio), torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                tiny.run(layer, torch.randn(batch, length, 24))
        return counter.get_total_flops()

    kept = n - sum(runs)
    expected = counted(kept, 1) + sum(counted(length, k) for length in runs)
    mask = torch.zeros(batch, n)
    mask[:, list(further)] = 1
    settings = {"ratio": {"ffn": {0: k}}, "batch": batch, "length": n, "kept": mask}
    for made in (model, tiny.patched(*variant, ratio=k, keep_first=first, keep_last=last)):
        given = {} if made is not model else {"keep_first": first, "keep_last": last}
        count = flops.count(made, **settings, **given)
        parts = count.multiply_adds
        dense = count.dense_multiply_adds.ffn // 2  # of the other layer
        assert 2 * (parts.ffn - dense + parts.merge + parts.decompress) == expected
        assert count.dense_multiply_adds == flops.count(made, batch, n, 1).multiply_adds
        assert count.parameters == flops.count(made, ratio={"ffn": {0: k}}).parameters


def test_kept_tokens_of_rows_of_their_own_lengths():
    model = tiny.model()
    settings = {"ratio": 4, "bottleneck": 6, "keep_last": 1}
    kept = torch.zeros(3, 9, dtype=torch.bool)
    kept[0, 4] = kept[1, 8] = kept[2, 0] = True  # of row 1 that is padding, row 2 has no token
    together = flops.count(model, length=(9, 5, 0), kept=kept, **settings).multiply_adds
    alone = [
        flops.count(model, 1, 9, kept=kept[:1], **settings).multiply_adds,
        flops.count(model, 1, 5, **settings).multiply_adds,
    ]
    for part in ("ffn", "merge", "decompress"):
        assert getattr(together, part) == sum(getattr(one, part) for one in alone)
    everything = flops.count(model, 2, 9, keep_first=10**12, ratio=4)
    assert everything.multiply_adds == everything.dense_multiply_adds


@pytest.mark.parametrize("variant", [("t5", "relu"), ("bert", "gelu")])
def test_the_counter_of_a_model_that_keeps_tokens(variant):
    """Shapes do not tell which tokens stay whole: it counts their merge and adapter too."""
    model = tiny.patched(*variant, keep_first=1, keep_last=2, attn_implementation="eager")
    ids, _ = tiny.batch(9, 9)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tiny.encode(model, ids)
    count = flops.count(model, batch=2, length=9, ratio=4)
    kept, layers = 2 * 3, 2
    more = layers * kept * ((4 * 24 + 24) + 3 * 6 * 24)
    assert counter.get_total_flops() == 2 * (count.multiply_adds.total + more)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_first": -1}, "keep_first must be >= 0, got -1"),
        ({"keep_last": True}, "keep_last must be an integer >= 0, got True"),
        ({"kept": torch.ones(2, 3)}, r"kept must be a tensor of shape \[1, 512\], got \[2, 3\]"),
        ({"kept": [[1]]}, r"kept must be a tensor of shape \[1, 512\], got list"),
    ],
)
def test_refuses_kept_tokens_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        flops.count(tiny.model(), **settings)
