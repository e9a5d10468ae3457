"""attention_kv and attention against loops written from the specification, in float64."""

import pytest
import torch

import variator_kernels as vk
from tests.sites.attention_cases import patched, placed, ragged, sublayer
from tests.sites.attention_loops import K, expected
from tests.sites.attention_models import (
    T5,
    Bert,
    Deberta,
    DebertaV2,
    Esm,
    LayoutLMv3,
    LongT5,
    LongT5Global,
    ModernBert,
    RoFormer,
)
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@placed
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "number"),
    [
        ("bert", Bert, 0),
        ("t5", T5, 0),
        ("modernbert", ModernBert, 0),
        ("modernbert", ModernBert, 1),
        ("longt5", LongT5, 0),
        ("longt5-global", LongT5Global, 0),
        ("esm", Esm, 0),
        ("roformer", RoFormer, 0),
        ("deberta", Deberta, 0),
        ("deberta-v2", DebertaV2, 0),
        ("layoutlmv3", LayoutLMv3, 1),
    ],
)
@torch.no_grad()
def test_ours_is_what_the_specification_says(name, kind, number, left, backend, placement):
    own = {"config_global_attn_every_n_layers": 2} if name == "modernbert" else {}
    if name == "deberta-v2":
        own = {"config_position_buckets": 8, "config_max_relative_positions": 32}
        own["config_norm_rel_ebd"] = "layer_norm"
    if name == "longt5-global":
        buckets, most = kind.t5
        own = {"config_relative_attention_num_buckets": buckets}
        own["config_relative_attention_max_distance"] = most
    model = patched(name, placement, keep_first=1, backend=backend, **own).double()
    layer = find(model).attentions[number]
    x, mask = ragged(left=left)
    kept = torch.zeros_like(mask)
    kept[0, 7] = kept[1, 0] = True
    with vk.keep(model, kept):
        got = sublayer(model, x, mask, number)
    plugin = layer.plugins[str(K)]
    for row in range(len(x)):
        whole = set(kept[row].nonzero().flatten().tolist())
        model = kind(layer)
        truth = expected(model, plugin, placement, x[row], mask[row].tolist(), 1, whole, row)
        torch.testing.assert_close(got[row], truth, atol=model.within, rtol=0, equal_nan=True)
