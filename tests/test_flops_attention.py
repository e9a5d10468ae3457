"""flops.count of attention's placements against PyTorch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

import variator_kernels as vk
from tests.sites import tiny, zoo
from tests.sites.attention_cases import encode, every, patched, placed
from tests.test_flops import BASE, needs_cpu
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore")
ADAPTER = 6 * zoo.D
"""r * d."""


def counted(model, level, lengths, mask=None):
    """PyTorch's counter, which fails where a view of a parameter asks for a gradient (DeBERTa)."""
    model.requires_grad_(False)
    ids, _ = tiny.batch(*lengths)
    with torch.no_grad(), vk.use_ratio(model, level), FlopCounterMode(display=False) as counter:
        encode(model, ids, mask)
    return counter


@pytest.mark.parametrize(("placement", "most"), [("attention_kv", 0.39), ("attention", 0.27)])
def test_a_whole_t5_base(placement, most):
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**BASE))
    count = vk.flops.count(model, length=512, ratio={"ffn": 4, placement: 4})
    assert count.fraction_left <= most
    n, d = 512, 768
    dense, used = count.dense_multiply_adds, count.multiply_adds
    queries = n if placement == "attention_kv" else n // 4
    assert used.attention_core == 12 * 2 * queries * (n // 4) * d
    assert used.attention_projections == 12 * 2 * (queries + n // 4) * d * d
    assert dense.attention_projections == 12 * 4 * n * d * d


@placed
@every
def test_the_counter_agrees(name, placement):
    """On the reference with whole groups: but for the adapter, which it does not split."""
    model = patched(name, "ffn", placement, keep_first=0, backend="reference", attention="eager")
    for lengths in ((9,), (6, 6)):
        for level in (1, 3, {"ffn": 3}, {placement: 3}, {placement: {1: 3}}, {"ffn": {0: 3}}):
            found = counted(model, level, lengths).get_total_flops()
            count = vk.flops.count(find(model).encoder, length=list(lengths), ratio=level)
            ratios = find(model).encoder.variator_state.check(level).ratios
            sites = find(model).encoder.variator_state.sites
            around = sum(
                k > 1 and site.placement != "attention_kv"
                for site, k in zip(sites, ratios, strict=True)
            )
            unsplit = around * sum(lengths) * ADAPTER * 2 // 3
            assert found == 2 * (count.multiply_adds.total + unsplit), (lengths, level)


@needs_cpu
@placed
@every
def test_products_with_kept_tokens_and_tails(name, placement):
    """What runs beside our own ops and attention's core is the projections, to the last one."""
    model = patched(name, placement, keep_first=1, keep_last=1, attention="eager")
    lengths, mask = (11, 7, 2), tiny.batch(11, 7, 2)[1]
    counts = counted(model, 3, lengths, mask).get_flop_counts()["Global"]
    ours = ("merge", "decompress")
    found = sum(flops for op, flops in counts.items() if not any(o in str(op) for o in ours))
    count = vk.flops.count(find(model).encoder, length=list(lengths), ratio=3).multiply_adds
    ffn = vk.flops.count(find(model).encoder, batch=3, length=11, ratio=1).multiply_adds.ffn
    rest = count.attention_projections + count.attention_core + count.other
    assert found == 2 * (rest + ffn)


@placed
@every
def test_parameters_are_those_of_the_model(name, placement):
    model = patched(name, "ffn", placement, keep_first=0)
    dense = sum(p.numel() for p in find(vk.unpatch(model)).encoder.parameters())
    level = {"ffn": 2, placement: 3}
    before = vk.flops.count(find(model).encoder, ratio=level, bottleneck=6, keep_first=0)
    vk.patch(model, level, {"ffn": (2,), placement: (3,)}, 6, keep_first=0)
    count = vk.flops.count(find(model).encoder, ratio=level)
    assert count == before
    assert count.dense_parameters.total == dense
    assert count.parameters.total == sum(p.numel() for p in find(model).encoder.parameters())


@placed
def test_lora_beside_compressed_attention(placement):
    peft = pytest.importorskip("peft")
    model = patched("bert", placement, keep_first=0, backend="reference", attention="eager")
    plain = vk.flops.count(model, length=[9, 9], ratio=3).multiply_adds
    settings = peft.LoraConfig(r=2, target_modules=["query", "value"])
    peft.inject_adapter_in_model(settings, model)
    with_lora = vk.flops.count(model, length=[9, 9], ratio=3).multiply_adds
    queries = 9 if placement == "attention_kv" else 3
    own = zoo.LAYERS * 2 * (queries + 3) * 2 * zoo.D * 2
    assert with_lora.total - plain.total == own
    found = counted(model, 3, (9, 9)).get_total_flops()
    unsplit = 0 if placement == "attention_kv" else zoo.LAYERS * 18 * ADAPTER * 2 // 3
    assert found == 2 * (with_lora.total + unsplit)
