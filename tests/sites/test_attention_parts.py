"""Parts around compressed attention that somebody replaces, hooks, quantises or adapts."""

import copy

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.sites import tiny, zoo
from tests.sites.attention_cases import (
    NAMES,
    encode,
    every,
    patched,
    placed,
)
from variator_kernels.sites.family import follow
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore")
IDS, MASK = tiny.batch(9, 4)
tables = pytest.mark.parametrize("name", ["t5", "umt5", "mpnet"])


@tables
@placed
def test_a_replaced_table_counts(name, placement):
    """Also one that is more than its weight, and in a dense layer behind a compressed first one."""
    model = patched(name, placement)
    paths = find(model).family.attention
    where, _, last = paths.table.format(layer=0).rpartition(".")
    owner = follow(find(model).encoder, where)
    new = nn.Embedding(*getattr(owner, last).weight.shape)
    level = {placement: {0: 3}}
    with vk.use_ratio(model, level):
        before = encode(model, IDS, MASK)
    setattr(owner, last, new)
    with vk.use_ratio(model, level):
        got = encode(model, IDS, MASK)
    assert not torch.allclose(got, before, atol=1e-3)
    fresh = patched(name, placement)
    follow(find(fresh).encoder, f"{where}.{last}").weight.data.copy_(new.weight.data)
    with vk.use_ratio(fresh, level):
        torch.testing.assert_close(got, encode(fresh, IDS, MASK))

    class Doubled(nn.Embedding):
        def forward(self, at):
            return 2 * super().forward(at)

    odd = Doubled(*new.weight.shape)
    odd.weight.data.copy_(new.weight.data / 2)
    setattr(owner, last, odd)
    with vk.use_ratio(model, level):
        torch.testing.assert_close(encode(model, IDS, MASK), got)
    vk.unpatch(model)
    assert follow(find(model).encoder, f"{where}.{last}") is odd


@pytest.mark.parametrize("placement", ["attention_kv", "attention"])
def test_replaced_rotations_count(placement):
    model = patched("eurobert", placement)
    new = copy.deepcopy(model.rotary_emb)
    new.inv_freq.mul_(3)
    model.rotary_emb = new
    fresh = patched("eurobert", placement)
    fresh.rotary_emb.inv_freq.mul_(3)
    torch.testing.assert_close(encode(model, IDS, MASK), encode(fresh, IDS, MASK))


@every
@placed
def test_hooks_and_other_modules_run_or_are_refused(name, placement):
    model = patched(name, placement)
    layer = find(model).attentions[0]
    paths = find(model).family.attention
    products = {p for p in (paths.q, paths.k, paths.v, paths.qkv, paths.o) if p}
    expected = encode(model, IDS, MASK)
    for path in (*products, *paths.bypassed):
        part, seen = follow(layer, path), []
        hook = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        if path in products:
            # Through the modules one product is cut otherwise: MKL rounds it so on some processors.
            got = encode(model, IDS, MASK)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
            assert seen, path
        else:
            with pytest.raises(TypeError, match=f"{path} of .* was replaced or hooked"):
                encode(model, IDS, MASK)
        hook.remove()
        assert torch.equal(encode(model, IDS, MASK), expected), path


# Whether the weights are tensors when a model is patched, and where: all of it for two families.
@pytest.mark.parametrize(
    ("name", "placement", "first"),
    [
        (name, placement, first)
        for name in NAMES
        for placement in ("attention_kv", "attention")
        for first in ("quantised", "patched")
        if name in ("bert", "t5") or (placement == "attention") == (first == "patched")
    ],
)
def test_other_linears_run(name, placement, first):
    """quantize_dynamic's, whose weights are no tensors. Nothing is padded here: they quantise
    whole batches, padding too."""

    if name == "layoutlmv3":
        pytest.skip(
            "transformers reads the weights of its tables of places, which are linear layers"
        )

    def quantise(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)

    if first == "patched":
        model = quantise(patched(name, placement))
    else:
        patched(name, placement)  # skips
        model = quantise(zoo.plain(name))
        vk.patch(model, 3, (2, 3), 6, placements=(placement,))
    ids, mask = tiny.batch(9, 9)
    exact = encode(zoo.plain(name), ids, mask)
    with vk.use_ratio(model, 1):
        expected = encode(model, ids, mask)
    with vk.keep(model, torch.ones_like(mask)):
        got = encode(model, ids, mask)
    assert (expected - exact).norm() / exact.norm() > 1e-4
    # DeBERTa's dense model rounds the vectors of this batch's distances, ours those of all; LongT5
    # makes global keys by a product of their own. So the two have scales of their own there.
    part = {"deberta": 1.2, "longt5-global": 1.5}.get(name, 0.3)
    assert (got - expected).norm() < part * (expected - exact).norm()
    assert encode(model, ids, mask).isfinite().all()


LORA = {
    "bert": ["query", "value"],
    "t5": ["q", "v"],
    "modernbert": ["Wqkv"],
    "bart": ["q_proj", "v_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "eurobert": ["q_proj", "v_proj"],
    "deberta": ["in_proj", "pos_q_proj"],
    "deberta-v2": ["query_proj", "pos_key_proj"],
    "layoutlmv3": ["query", "value"],
}


@placed
@pytest.mark.parametrize("name", list(LORA))
@pytest.mark.parametrize("first", ["lora", "patch"])
def test_lora(name, placement, first):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=3, target_modules=LORA[name], init_lora_weights=False)

    def adapted(model):
        torch.manual_seed(7)
        return peft.inject_adapter_in_model(settings, model).eval()

    if not zoo.installed(name):
        pytest.skip(f"this version of transformers has no {name}")
    expected = encode(adapted(zoo.plain(name)), IDS, MASK)
    unlike = encode(zoo.plain(name), IDS, MASK)
    assert not torch.allclose(expected, unlike, atol=1e-3)
    if first == "lora":
        model = adapted(zoo.plain(name))
        try:
            vk.patch(model, 3, (2, 3), 6, placements=(placement,))
        except ValueError as error:
            if "another version of transformers" in str(error):
                pytest.skip(str(error))
            raise
    else:
        model = adapted(patched(name, placement))
    with vk.keep(model, torch.ones_like(MASK)):
        got = encode(model, IDS, MASK)
        torch.testing.assert_close(got[MASK > 0], expected[MASK > 0], atol=1e-5, rtol=1e-5)
        got[MASK > 0].square().sum().backward()
    trained = [p.grad for n, p in model.named_parameters() if "lora_B" in n and "decoder" not in n]
    assert all(grad is not None and grad.abs().max() > 0 for grad in trained)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    with vk.keep(model, torch.ones_like(MASK)), torch.no_grad():
        got = encode(model, IDS, MASK)
    torch.testing.assert_close(got[MASK > 0], expected[MASK > 0], atol=1e-4, rtol=1e-4)
