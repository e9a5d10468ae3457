"""flops.count of what attention and embeddings have besides, in configurations that a table of
families hides, against PyTorch's counter."""

import pytest
import torch
import transformers

import variator_kernels as vk
from tests.sites import zoo
from tests.sites.test_terms import skip_unless_installed
from tests.test_flops_attention import counted
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = [
    *(("longt5", {"local_radius": radius}) for radius in (1, 4, 20)),
    *(("longt5-global", {"global_block_size": size}) for size in (3, 4, 16)),
    *(
        (name, {"pos_att_type": kinds})
        for name in ("deberta", "deberta-v2")
        for kinds in (["p2c"], ["c2p", "c2p"], [])
    ),
    ("deberta", {"max_relative_positions": 3}),
    ("deberta", {"relative_attention": False}),
    ("deberta", {"embedding_size": 16}),
    ("deberta-v2", {"position_buckets": 4, "share_att_key": True}),
    ("deberta-v2", {"pos_att_type": ["c2p"], "share_att_key": True}),
    ("deberta-v2", {"conv_kernel_size": 3, "conv_groups": 2, "embedding_size": 16}),
    ("roc_bert", {"enable_shape": True, "shape_embed_dim": 5}),
    ("roc_bert", {"concat_input": False}),
    ("markuplm", {"max_depth": 2}),
]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
@pytest.mark.parametrize("lengths", [(9,), (6, 6)])
def test_the_counter_agrees(name, settings, lengths):
    skip_unless_installed(name)
    model = vk.patch(
        zoo.plain(name, "eager", **settings), 3, (3,), placements=("attention_kv",),
        backend="reference", keep_first=0,
    )  # fmt: skip
    for ratio in (1, 3, {"attention_kv": {0: 3}}):
        found = counted(model, ratio, lengths).get_total_flops()
        count = vk.flops.count(model, length=list(lengths), ratio=ratio)
        assert found == 2 * count.multiply_adds.total, ratio
    dense = sum(p.numel() for p in find(vk.unpatch(model)).encoder.parameters())
    assert count.dense_parameters.total == dense


def test_heads_that_are_mixed():
    """A dense DeBERTa alone has them: merged keys do not know them."""
    skip_unless_installed("deberta")
    model = vk.patch(zoo.plain("deberta", talking_head=True), 1, (3,))
    count = vk.flops.count(model, length=[9], ratio=1).multiply_adds
    assert counted(model, 1, (9,)).get_total_flops() == 2 * count.total


def test_the_products_of_deberta_base():
    """By hand: half of the vectors are of distances that 128 tokens do not have."""
    skip_unless_installed("deberta")
    config = transformers.DebertaConfig(
        relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=-1
    )
    with torch.device("meta"):
        model = transformers.DebertaModel(config)
    n, d, layers = 128, 768, 12
    dense = vk.flops.count(model, batch=3, length=n, ratio=1).multiply_adds
    assert dense.attention_core == 3 * layers * (2 * n * n * d + 2 * n * 2 * n * d)
    assert dense.attention_projections == layers * (3 * 4 * n * d * d + 2 * 2 * n * d * d)
    level = {"attention_kv": 4}
    ours = vk.flops.count(model, batch=3, length=n, ratio=level, keep_first=0).multiply_adds
    assert ours.attention_core == 3 * layers * (2 * n * n // 4 * d + (n + n // 4) * 1024 * d)
    assert ours.attention_projections == layers * (3 * (2 + 2 / 4) * n * d * d + 2 * 1024 * d * d)


@pytest.mark.parametrize("shared", [False, True])
def test_lora_beside_products_of_distances(shared):
    skip_unless_installed("deberta-v2")
    peft = pytest.importorskip("peft")
    model = vk.patch(
        zoo.plain("deberta-v2", share_att_key=shared), 3, (3,), placements=("attention_kv",),
        backend="reference", keep_first=0,
    )  # fmt: skip
    wanted = ["key_proj"] if shared else ["pos_key_proj", "query_proj"]
    settings = peft.LoraConfig(r=2, target_modules=wanted)
    peft.inject_adapter_in_model(settings, model)
    for ratio in (1, 3):
        found = counted(model, ratio, (9, 9)).get_total_flops()
        assert found == 2 * vk.flops.count(model, length=[9, 9], ratio=ratio).multiply_adds.total
    dense = vk.flops.count(model, ratio=1).dense_parameters.total
    assert dense == sum(p.numel() for n, p in model.named_parameters() if ".plugins." not in n)


def test_attention_over_blocks_is_refused():
    skip_unless_installed("big_bird")
    model = zoo.plain("big_bird", attention_type="block_sparse", block_size=2, num_random_blocks=1)
    with pytest.raises(ValueError, match="knows whole, big_bird has a BigBirdBlockSparseAttention"):
        vk.flops.count(model)
