"""attention_kv and attention in models: every family that has them, on a small random model."""

import copy
import dataclasses
import inspect
import pickle
import sys

import pytest
import torch

import variator_kernels as vk
from tests.sites import attention_cases, tiny, zoo
from tests.sites.attention_cases import patched, placed, places
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = [name for name in zoo.NAMES if zoo.family(name).attention is not None]
every = pytest.mark.parametrize("name", NAMES)
# Of families that differ in the names of their classes alone, the first.
FORMS = {
    dataclasses.replace(zoo.family(name).attention, layer="one"): name for name in reversed(NAMES)
}
each_form = pytest.mark.parametrize(
    "name", [name for name in NAMES if name in FORMS.values() or name in zoo.FORMS]
)
encode = torch.no_grad()(attention_cases.encode)


@placed
@every
def test_dense_where_everything_is_kept(name, placement):
    """The sublayer's description is what transformers computes: norms, biases, positions."""
    model = patched(name, placement)
    ids, mask = tiny.batch(9, 4)
    with vk.use_ratio(model, 1):
        expected = encode(model, ids, mask)
    with vk.keep(model, torch.ones_like(mask)):
        got = encode(model, ids, mask)
    torch.testing.assert_close(got[mask > 0], expected[mask > 0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(encode(model, ids, mask)[mask > 0], expected[mask > 0], atol=1e-3)


@placed
@each_form
def test_a_row_depends_on_itself_alone(name, placement):
    if name in zoo.LEAKS:
        pytest.skip(zoo.LEAKS[name])
    model = patched(name, "ffn", placement, keep_first=1)
    ids, _ = tiny.batch(7)
    alone = encode(model, ids, torch.ones_like(ids))
    sides = (False,) if name in zoo.ABSOLUTE else (False, True)
    for left in sides:
        wide, mask = tiny.batch(7, 12, left=left)
        wide[0, mask[0] > 0] = ids[0]
        got = encode(model, wide, mask)[0][mask[0] > 0]
        torch.testing.assert_close(got, alone[0], atol=2e-5, rtol=1e-4)


@placed
@each_form
def test_undone_copied_and_saved(name, placement, tmp_path):
    model = zoo.plain(name)
    ids, mask = tiny.batch(9, 4)
    before, expected = tiny.snapshot(model), encode(model, ids, mask)
    model = patched(name, "ffn", placement)
    compressed = encode(model, ids, mask)
    with vk.use_ratio(model, 1):
        assert torch.equal(encode(model, ids, mask), expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(encode(copied, ids, mask), compressed)
    vk.save_plugins(model, tmp_path)
    loaded = zoo.plain(name)
    vk.load_plugins(loaded, tmp_path)
    assert torch.equal(encode(loaded, ids, mask), compressed)
    assert vk.describe(loaded) == vk.describe(model)
    for one in (model, loaded):
        vk.unpatch(one)
        assert tiny.snapshot(one) == before
        assert torch.equal(encode(one, ids, mask), expected)


@placed
@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(name, placement, dtype):
    """Of the error that 16 bits make in the dense model, not much more."""
    if not zoo.runs(name, dtype):
        pytest.skip(f"transformers itself does not run {name} in {dtype}")
    model = patched(name, "ffn", placement)
    ids, mask = tiny.batch(9, 4)
    exact = encode(copy.deepcopy(model).double(), ids, mask)[mask > 0]
    model.to(dtype)
    got = encode(model, ids, mask)[mask > 0].double()
    error = (got - exact).norm() / exact.norm()
    # bf16 has 8 bits: two layers of six roundings each.
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize(
    "name",
    [
        *("t5", "umt5", "bert", "mpnet", "modernbert", "bart"),
        *("longt5", "longt5-global", "deberta", "deberta-v2", "layoutlmv3"),
    ],
)
@pytest.mark.parametrize("left", [False, True])
def test_equal_tokens_are_seen_as_all_of_them(name, left):
    """Where a group's tokens have one hidden vector, the merged key weighs as they do together:
    exactly the dense sublayer, whatever the relative positions, window, mask, tail and holes."""
    model = patched(name, "attention_kv", ratio=3, keep_first=0)
    found = find(model)
    layer = found.attentions[0]
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(2, 4, zoo.D, generator=generator)
    x = groups.repeat_interleave(3, 1)[:, :11]
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 7:] = False
    if left:
        x, mask = x.flip(1), mask.flip(1)
        x[0], x[1, 4:] = (
            groups[0].repeat_interleave(3, 0)[:11],
            groups[1].repeat_interleave(3, 0)[:7],
        )
    mask[0, 4] = False  # a hole
    extra = {}
    additive = torch.zeros(2, 1, 11, 11).masked_fill(~mask[:, None, None], -1e30)
    if name == "modernbert":  # RoPE tells a group's tokens apart: none here, windows alone
        layer = found.attentions[1]

        def unturned(x, position, *_):
            shape = *position.shape, zoo.D // zoo.HEADS
            return torch.ones(shape), torch.zeros(shape)

        found.encoder._modules["rotary_emb"] = unturned
        place = torch.arange(11)
        extra = {"position_embeddings": unturned(x, place[None])}
        far = (place[:, None] - place).abs() >= layer.sliding_window
        additive = additive.masked_fill(far, -1e30)
    if name == "mpnet":
        extra = {"position_bias": found.encoder.encoder.compute_position_bias(x)}
    if name == "longt5":
        module, size = sys.modules[found.family.module], layer.LocalSelfAttention.block_len
        additive = module._get_local_attention_mask(mask, size, mask.device)
    if name == "longt5-global":
        if left:
            pytest.skip("transformers counts its blocks from column 0: padding in front moves them")
        additive = mask.long()
    if name.startswith("deberta"):
        inner = found.encoder.encoder
        extra = {"rel_embeddings": inner.get_rel_embedding(), "relative_pos": inner.get_rel_pos(x)}
        additive = mask[:, None, None] & mask[:, None, :, None]
    carried = places(x)
    if name == "layoutlmv3":
        inner = found.encoder.encoder
        extra = {
            "rel_pos": inner._cal_1d_pos_emb(carried["position_ids"]),
            "rel_2d_pos": inner._cal_2d_pos_emb(carried["bbox"]),
        }
    inner = getattr(layer, "SelfAttention", layer)
    if "cache_position" in inspect.signature(inner.forward).parameters:  # transformers 4.57
        extra["cache_position"] = torch.arange(11)
    state = found.encoder.variator_state
    with torch.no_grad():
        for level in (1, 3):
            state.local.context = state.context(state.check(level), mask)
            state.local.context.carried = carried
            y = layer(x, attention_mask=additive if level == 1 else None, **extra)
            y = y[0] if isinstance(y, tuple) else y
            if level == 1:
                expected = y
        state.local.context = None
    torch.testing.assert_close(y[mask], expected[mask], atol=2e-5, rtol=1e-4)
    if found.family.attention.adds:
        assert torch.equal(y[~mask], x[~mask])
    else:
        assert (y[~mask] == 0).all()


@placed
@pytest.mark.parametrize("name", ["t5", "umt5", "longt5", "longt5-global"])
def test_t5_makes_its_bias_wherever_a_dense_layer_needs_it(name, placement):
    """The first block's table is the bias of all; that block may be the compressed one."""
    model = patched(name, placement)
    ids, mask = tiny.batch(9, 4)
    with vk.use_ratio(model, 1):
        expected = encode(model, ids, mask)
    for layer in (0, 1):
        level = {placement: {layer: 3}}
        with vk.use_ratio(model, level), vk.keep(model, torch.ones_like(mask)):
            got = encode(model, ids, mask)
        torch.testing.assert_close(got[mask > 0], expected[mask > 0], atol=1e-5, rtol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"placements must be \('ffn',\) for lilt: two streams"):
        vk.patch(zoo.plain("lilt"), placements=("attention_kv",))
    for name, settings, why in (
        ("big_bird", {"attention_type": "block_sparse"}, "attention is a BigBirdBlockSparseAtt"),
        ("deberta", {"talking_head": True}, "whose self.head_logits_proj is"),
        ("roformer", {"rotary_value": True}, "whose self.rotary_value is True"),
    ):
        start = r"placements must be \('ffn',\)"
        with pytest.raises(ValueError, match=rf"{start} (for|where) a {name}.*{why}"):
            vk.patch(zoo.plain(name, **settings), placements=("attention_kv",))
    prompted = zoo.plain("mvp")
    prompted.encoder.use_prompt = True  # transformers 5 does not pass the configuration's on
    with pytest.raises(ValueError, match="for a mvp whose use_prompt is True"):
        vk.patch(prompted, placements=("attention_kv",))
    model = patched("bert", "ffn", "attention_kv")
    ids, mask = tiny.batch(5)
    with pytest.raises(ValueError, match="output_attentions must be off"):
        model(ids, attention_mask=mask, output_attentions=True)
    with vk.use_ratio(model, {"ffn": 3}):
        model(ids, attention_mask=mask, output_attentions=True)
    with pytest.raises(ValueError, match=r"for 'attention_kv', \(2, 3\), got 5"):
        vk.patch(vk.unpatch(model), ratios={"ffn": (5,), "attention_kv": (2, 3)}, ratio={"ffn": 5})
        vk.set_ratio(model, 5)


def test_each_placement_has_ratios_of_its_own(tmp_path):
    model = zoo.plain("t5")
    vk.patch(model, {"ffn": 4, "attention_kv": {0: 2}}, {"ffn": (4,), "attention_kv": (2, 3)}, 6)
    assert "attention_kv: 2, 3" in vk.describe(model)
    assert "{'ffn': {0: 4, 1: 4}, 'attention_kv': {0: 2}}" in vk.describe(model)
    tiny.train_plugins(model)
    ids, mask = tiny.batch(9, 4)
    expected = encode(model, ids, mask)
    vk.save_plugins(model, tmp_path)
    other = zoo.plain("t5")
    vk.load_plugins(other, tmp_path)
    assert torch.equal(encode(other, ids, mask), expected)
    with pytest.raises(ValueError, match="placement 'attention_kv', the model was patched for"):
        vk.load_plugins(vk.patch(zoo.plain("t5"), 4, (4,), 6), tmp_path)


def test_attention_alone_leaves_the_ffn_as_it_was():
    for name in ("bert", "bart", "t5", "distilbert"):
        model = patched(name, "attention_kv")
        assert all(not hasattr(layer, "plugins") for layer in find(model).layers)
        encode(model, *tiny.batch(9, 4))


@placed
@pytest.mark.parametrize("image", [False, True])
@torch.no_grad()
def test_places_on_a_page_count(placement, image):
    """LayoutLMv3: boxes reach the keys, and patches of an image are tokens of every row."""
    sizes = {"visual_embed": True, "input_size": 8, "patch_size": 4} if image else {}
    model = patched("layoutlmv3", "ffn", placement, **{f"config_{k}": v for k, v in sizes.items()})
    ids, mask = tiny.batch(9, 4)
    boxes = torch.randint(0, 500, (2, 9, 4), generator=torch.Generator().manual_seed(0)).sort(-1)[0]
    given = {"bbox": boxes}
    if image:
        given["pixel_values"] = torch.randn(2, 3, 8, 8)
    patches = 5 if image else 0
    real = torch.cat((mask, mask.new_ones(2, patches)), 1)

    def run(rows=slice(None), length=9):
        few = {k: v[rows, :length] if k == "bbox" else v[rows] for k, v in given.items()}
        got = model(ids[rows, :length], attention_mask=mask[rows, :length], **few)
        return got.last_hidden_state

    with vk.use_ratio(model, 1):
        expected = run()[real > 0]
    with vk.keep(model, torch.ones_like(real)):
        torch.testing.assert_close(run()[real > 0], expected, atol=1e-5, rtol=1e-5)
    got = run()
    alone = run(slice(1, 2), 4)[0]
    if not image:  # patches follow the padding: a group of both would have a hole
        torch.testing.assert_close(got[1][real[1] > 0], alone, atol=2e-5, rtol=1e-4)
    given["bbox"] = torch.zeros_like(boxes)
    assert not torch.allclose(run()[real > 0], got[real > 0], atol=1e-3)
