"""Global keys of blocks (LongT5's transient-global attention) against those of transformers."""

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny, zoo
from tests.sites.attention_cases import encode, patched, placed
from variator_kernels.ops.feed_forward import normalize
from variator_kernels.ops.grouped_attention.reference import looked_up
from variator_kernels.ops.self_attention import BlockTable, GlobalKeys, Table, with_global_keys
from variator_kernels.ops.self_attention.blocks import Blocks, Sums
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def masks(n):
    """All, a tail of padding, holes, fewer than a block, one block, a token."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(6, n, dtype=torch.long)
    mask[1, 2 * n // 3 :] = 0
    mask[2] = (torch.rand(n, generator=generator) > 0.3).long()
    mask[2, 0] = 1  # transformers counts from column 0, ours from a row's first token
    mask[3, 3:] = 0
    mask[4, 4:] = 0
    mask[5, 1:] = 0
    return mask


@pytest.mark.parametrize("n", [5, 8, 41, 700])
def test_blocks_terms_and_sums_are_those_of_transformers(n, monkeypatch):
    """700 tokens are more blocks than the table tells apart; compilers get tables of all."""
    model = zoo.plain("longt5-global", global_block_size=4).double()
    inner = find(model).attentions[0].TransientGlobalSelfAttention
    module = __import__(type(inner).__module__, fromlist=["_"])
    mask = masks(n)
    x = torch.randn(*mask.shape, zoo.D, dtype=torch.float64)
    ids, segments = module._make_global_fixed_block_ids(mask, 4)
    table = Table(inner.global_relative_attention_bias.weight)
    real = mask > 0
    blocks = Blocks(real, x, BlockTable(table, 4))
    places = torch.arange(n).expand(len(mask), -1)
    block = torch.where(real, blocks.of(places), blocks.most)
    assert torch.equal(block, torch.where(ids < 0, blocks.most, ids.long()))
    assert torch.equal(blocks.bias(torch.float64) == 0, segments > 0)
    norm = inner.global_input_layer_norm
    keys = GlobalKeys(norm.weight, norm.variance_epsilon, 4)
    sums = module._create_global_aggregates(x, ids, blocks.most)
    expected = normalize(sums, "rms", norm.weight, None, norm.variance_epsilon)
    got = with_global_keys(x, x, Sums(block, blocks.most), keys)
    torch.testing.assert_close(got, torch.cat((x, expected), 1), atol=1e-12, rtol=0)
    expected = inner.compute_side_bias(mask, segments)
    seen = (real[:, :, None] & (segments > 0)[:, None])[:, None].expand_as(expected)
    assert n < 4 or seen.any()
    for traced in (False, True):
        monkeypatch.setattr(f"{Blocks.__module__}.tracing", lambda traced=traced: traced)
        got = looked_up(blocks.distances(places, torch.float64))
        assert torch.equal(got[seen], expected[seen])


@placed
def test_both_kinds_of_a_family(placement, tmp_path):
    """A model that is configured to the other attention is another form of one family."""
    models = {name: patched(name, "ffn", placement) for name in ("longt5", "longt5-global")}
    ids, mask = tiny.batch(9, 4)
    for name, model in models.items():
        assert find(model).family.name == "longt5"
        expected = encode(model, ids, mask)
        vk.save_plugins(model, tmp_path / name)
        again = zoo.plain(name)
        vk.load_plugins(again, tmp_path / name)
        assert torch.equal(encode(again, ids, mask), expected)
    vk.unpatch(models["longt5"])
    assert find(models["longt5-global"]).attentions[0].variator_reach.paths.global_keys


@pytest.mark.parametrize("table", ["relative_attention_bias", "global_relative_attention_bias"])
@placed
def test_a_replaced_table_counts(table, placement):
    """Also in a dense layer behind a compressed first one, which makes its bias by itself."""
    model = patched("longt5-global", placement)
    ids, mask = tiny.batch(9, 4)
    inner = find(model).attentions[0].TransientGlobalSelfAttention
    level = {placement: {0: 3}}
    with vk.use_ratio(model, level):
        before = encode(model, ids, mask)
    new = torch.nn.Embedding(*getattr(inner, table).weight.shape)
    setattr(inner, table, new)
    with vk.use_ratio(model, level):
        got = encode(model, ids, mask)
    assert not torch.allclose(got, before, atol=1e-3)
    fresh = patched("longt5-global", placement)
    inner = find(fresh).attentions[0].TransientGlobalSelfAttention
    getattr(inner, table).weight.data.copy_(new.weight.data)
    with vk.use_ratio(fresh, level):
        torch.testing.assert_close(got, encode(fresh, ids, mask))
    vk.unpatch(model)
    assert "relative_attention_bias" not in vars(
        find(model).attentions[1].TransientGlobalSelfAttention
    )
    assert not hasattr(
        find(model).attentions[1].TransientGlobalSelfAttention, "global_relative_attention_bias"
    )
