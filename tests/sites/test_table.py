"""What holds for every family in the table, on a small random model of each."""

import copy

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import variator_kernels as vk
from tests.sites import tiny, zoo
from variator_kernels.runtime.state import observe
from variator_kernels.sites.families import FAMILIES
from variator_kernels.sites.family import follow
from variator_kernels.sites.feed_forward import describe
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
every = pytest.mark.parametrize("name", zoo.NAMES)


def patched(name, ratio=3, sizes=None, **settings):
    made = vk.patch(zoo.plain(name, **sizes or {}), ratio, (2, 3), 6, **settings)
    tiny.train_plugins(made)
    return made


@torch.no_grad()
def encode(model, ids, mask=None, **settings):
    settings = positions(model, mask) | settings
    return find(model).encoder(ids, attention_mask=mask, **settings).last_hidden_state


def positions(model, mask):
    """For families whose positions are absolute, and not made of the ids."""
    if mask is None or find(model).family.name not in zoo.GIVEN:
        return {}
    first = 2 if find(model).family.name == "mpnet" else 0  # whose padding is always token 1
    return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0) + first}


def test_no_two_families_share_the_name_of_a_patched_class():
    """A pickle finds a class by its name alone."""
    names = [name for f in FAMILIES.values() for name in {f.encoder, f.block, f.layer}]
    assert len(names) == len(set(names))


def test_at_least_thirty():
    assert len(FAMILIES) >= 30 and len(zoo.NAMES) >= 30


@every
def test_undone_exactly(name):
    model = zoo.plain(name)
    ids, mask = tiny.batch(9, 4)
    expected, before = encode(model, ids, mask), tiny.snapshot(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    vk.patch(model, ratio=1, ratios=(3,), bottleneck=6)
    tiny.train_plugins(model)
    assert torch.equal(encode(model, ids, mask), expected)
    with vk.use_ratio(model, 3):
        compressed = encode(model, ids, mask)
    assert compressed.isfinite().all()
    assert not torch.allclose(compressed, expected, atol=1e-2)
    assert torch.equal(encode(model, ids, mask), expected)
    vk.unpatch(model)
    assert tiny.snapshot(model) == before
    assert torch.equal(encode(model, ids, mask), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_the_rule_of_a_float64_reference(name, dtype):
    """One sublayer on the same input: section 6's rule is about kernels, not about attention."""
    ids, mask = tiny.batch(9, 4)
    model = patched(name).to(dtype)
    if not zoo.runs(name, dtype):
        pytest.skip(f"transformers itself does not run {name} in {dtype}")
    inputs, outputs = [], {}

    def see(layer, x, mask, ratio):
        inputs.append((layer, x.clone(), mask))

    state = find(model).encoder.variator_state
    with observe(state, see):
        out = encode(model, ids, mask)
    assert out.dtype == dtype and out.isfinite().all()
    layers = find(model).layers
    assert [layer for layer, _, _ in inputs] == layers
    layer, x, real = inputs[-1]
    plugin, ffn = layer.plugins["3"].weights(), layer.feed_forward()
    assert ffn.module is None
    wide = lambda t: t.double() if isinstance(t, torch.Tensor) else t  # noqa: E731
    truth = vk.functional.compressed_ffn(
        x.double(),
        type(plugin)(*map(wide, plugin)),
        type(ffn)(*map(wide, ffn)),
        mask=real,
        backend="reference",
    )
    for backend in ("reference", "auto"):
        with torch.no_grad():
            got = vk.functional.compressed_ffn(x, plugin, ffn, mask=real, backend=backend)
        outputs[backend] = (got.double() - truth).abs().max().item()
    assert outputs["auto"] <= 2 * outputs["reference"] + 1e-6


@every
@pytest.mark.parametrize("left", [False, True])
def test_a_row_depends_on_itself_alone(name, left):
    if left and name in zoo.ABSOLUTE | zoo.BLOCKS:
        pytest.skip("its positions are those of columns: left padding moves a row, dense too")
    if name in zoo.LEAKS:
        pytest.skip(zoo.LEAKS[name])
    model = patched(name)
    lengths = (9, 4, 7)
    ids, mask = tiny.batch(*lengths, left=left, width=11)
    together = encode(model, ids, mask)
    for row in range(len(lengths)):
        real = mask[row].bool()
        alone = encode(model, ids[row][real][None])
        torch.testing.assert_close(together[row][real], alone[0], atol=5e-5, rtol=1e-4)


@every
def test_saved_and_loaded(name, tmp_path):
    model, again = patched(name), zoo.plain(name)
    ids, mask = tiny.batch(9, 4)
    vk.save_plugins(model, tmp_path)
    vk.load_plugins(again, tmp_path)
    assert torch.equal(encode(again, ids, mask), encode(model, ids, mask))
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
    assert f"family        {zoo.family(name).name}," in vk.describe(model)


@every
def test_weights_tell_what_the_sublayer_does(name):
    """A hook on ``w_out`` makes the module run in place of the products: the same comes out."""
    model = patched(name)
    ids, mask = tiny.batch(9, 4)
    expected = encode(model, ids, mask)
    handles = [
        follow(layer, find(model).family.w_out).register_forward_hook(lambda *_: None)
        for _, layer in find(model).own_layers
    ]
    assert all(describe(layer).module is not None for layer in find(model).layers)
    torch.testing.assert_close(encode(model, ids, mask), expected, atol=2e-4, rtol=1e-4)
    for handle in handles:
        handle.remove()
    assert torch.equal(encode(model, ids, mask), expected)


@every
def test_gradients_with_checkpointing(name):
    """Base and plugins get the same gradients with and without gradient checkpointing."""
    ids, mask = tiny.batch(9, 4)
    grads = []
    for checkpointing in (False, True):
        model = patched(name).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            if not model.supports_gradient_checkpointing:
                pytest.skip(f"transformers has no gradient checkpointing for {name}")
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found = find(model)
        out = found.encoder(ids, attention_mask=mask).last_hidden_state
        (out * mask[..., None]).square().mean().backward()
        wanted = [layer.plugins["3"] for _, layer in found.own_layers]
        got = [p.grad for plugin in wanted for p in plugin.parameters()]
        got += [follow(layer, found.family.w_out).weight.grad for _, layer in found.own_layers]
        assert all(grad is not None and grad.any() for grad in got)
        grads.append(got)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


@every
def test_cost(name):
    if name == "modernbert" and transformers.__version__ < "5":
        pytest.skip("this version makes angles of positions by a product, in every layer")
    # The ops' formulas do not know which tokens bypass merge and adapter.
    model = vk.patch(zoo.plain(name, "eager"), 3, (3,), 6, keep_first=0)
    model.requires_grad_(False)  # the counter fails where a view of a parameter asks for a gradient
    ids, _ = tiny.batch(9, 9)
    if zoo.family(name).uncounted:
        with pytest.raises(ValueError, match=f"knows whole, {name} has"):
            vk.flops.count(model, 2, 9, 3)
        return
    for ratio, count in ((1, "dense"), (3, "used")):
        with vk.use_ratio(model, ratio), FlopCounterMode(display=False) as counter:
            encode(model, ids)
        expected = vk.flops.count(model, 2, 9, ratio).multiply_adds
        assert counter.get_total_flops() == 2 * expected.total, count
