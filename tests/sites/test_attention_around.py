"""What people do around a model whose attention is compressed: wrong at worst by an error."""

import copy
import io
import pickle
import threading

import pytest
import torch
import transformers
from torch import nn

import variator_kernels as vk
from tests.sites import tiny, zoo
from tests.sites.attention_cases import (
    NAMES,
    encode,
    every,
    patched,
    placed,
    ragged,
    sublayer,
    turned,
)
from variator_kernels.sites.family import follow
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore")
IDS, MASK = tiny.batch(9, 4)
tables = pytest.mark.parametrize("name", ["t5", "umt5", "mpnet"])


def classifier(*placements, ratio=3):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(zoo.config("bert")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    if placements:
        vk.patch(model, ratio, (2, 3), 6, placements=placements)
        tiny.train_plugins(model)
    return model


def test_keys_from_elsewhere_are_refused():
    """Prefix tuning gives BERT keys and values of its own, which merged keys would leave out."""
    peft = pytest.importorskip("peft")
    model = classifier("ffn", "attention_kv")
    settings = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(model, settings).eval()
    with pytest.raises(ValueError, match=r"past_key_values must be None.*prefix tuning"):
        wrapped(input_ids=IDS, attention_mask=MASK)
    with vk.use_ratio(model, {"ffn": 3}):
        wrapped(input_ids=IDS, attention_mask=MASK)


def test_a_mask_of_heads_is_refused():
    model = patched("bert", "ffn", "attention_kv")
    with pytest.raises(ValueError, match="head_mask must be None"):
        model(IDS, attention_mask=MASK, head_mask=torch.ones(2, 4))
    with vk.use_ratio(model, {"ffn": 3}):
        model(IDS, attention_mask=MASK, head_mask=torch.ones(2, 4))


@every
def test_a_sublayer_alone_refuses_a_mask(name):
    """Without its encoder's context it would take padding for tokens."""
    model = patched(name, "attention_kv")
    x, mask = ragged(torch.float32)
    layer = find(model).attentions[0]
    extra = turned(model, x)
    additive = torch.zeros(3, 1, 1, 11).masked_fill(~mask[:, None, None], -1e30)
    with pytest.raises(ValueError, match=r"attention_mask must be None.*outside of its encoder"):
        layer(x, attention_mask=additive, **extra)
    with pytest.raises(ValueError, match=r"attention_mask must be None.*outside of its encoder"):
        layer(x, *extra.values(), additive)
    if not layer.variator_reach.paths.places:  # which the encoder brings
        layer(torch.nan_to_num(x), attention_mask=None, **extra)


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


@every
@placed
def test_autocast_forward_and_backward(name, placement):
    model = patched(name, "ffn", placement, keep_first=1)
    exact = encode(model, IDS, MASK)[MASK > 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = encode(model, IDS, MASK)[MASK > 0]
        got.float().square().sum().backward()
    assert (got.float() - exact).norm() / exact.norm() < 0.05
    for parameter in vk.plugin_parameters(model, [3]):
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    with torch.inference_mode():
        torch.testing.assert_close(encode(model, IDS, MASK)[MASK > 0], exact, atol=1e-5, rtol=1e-5)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(encode(copied, IDS, MASK)[MASK > 0], exact)
    file = io.BytesIO()
    torch.save(find(model).attentions[1], file)  # a sublayer alone


@placed
@pytest.mark.parametrize("name", ["bert", "t5", "modernbert"])
def test_threads_have_levels_of_their_own(name, placement):
    model = patched(name, "ffn", placement, keep_first=1)
    expected, wrong = {}, []
    for ratio in (1, 2, 3):
        with vk.use_ratio(model, ratio), torch.no_grad():
            expected[ratio] = encode(model, IDS, MASK)

    def work(ratio):
        for _ in range(20):
            with vk.use_ratio(model, ratio), torch.no_grad():
                if not torch.equal(encode(model, IDS, MASK), expected[ratio]):
                    wrong.append(ratio)

    threads = [threading.Thread(target=work, args=(ratio,)) for ratio in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@placed
@pytest.mark.parametrize("name", ["bert", "t5", "modernbert"])
def test_replicas(name, placement):
    """As DataParallel makes them: shallow copies with tensors for parameters."""
    model = patched(name, placement)
    expected = encode(model, IDS, MASK)
    replica = _replica(model)
    torch.testing.assert_close(encode(replica, IDS, MASK), expected)


def _replica(module):
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = child if child is None else _replica(child)
    for name, parameter in module._parameters.items():
        setattr(copied, name, None if parameter is None else parameter.detach().clone())
    return copied


@placed
@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_offloaded_weights_are_refused(name, placement):
    accelerate = pytest.importorskip("accelerate")
    model = patched(name, placement)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match="accelerate's hook"):
        encode(model, IDS, MASK)


@placed
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_reads_what_the_encoder_gave(name, placement):
    """Cross-attention and the decoder are what they were."""
    if name == "t5":
        model = tiny.model("t5")
    else:
        torch.manual_seed(0)
        model = transformers.BartForConditionalGeneration(zoo.config("bart")).eval()
    settings = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    dense = model.generate(IDS, attention_mask=MASK, **settings)
    vk.patch(model, 3, (3,), 6, placements=("ffn", placement))
    tiny.train_plugins(model)
    with torch.no_grad():
        hidden = find(model).encoder(IDS, attention_mask=MASK)
    got = model.generate(IDS, attention_mask=MASK, **settings)
    given = model.generate(encoder_outputs=hidden, attention_mask=MASK, **settings)
    assert torch.equal(got, given)
    with vk.use_ratio(model, 1):
        assert torch.equal(model.generate(IDS, attention_mask=MASK, **settings), dense)


@every
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_how_dense_attention_runs_makes_no_difference(name, attention):
    if not zoo.installed(name):
        pytest.skip(f"this version of transformers has no {name}")
    if attention == "sdpa" and not getattr(type(zoo.plain(name)), "_supports_sdpa", False):
        pytest.skip(f"transformers {transformers.__version__} has no sdpa for {name}")
    model = patched(name, "attention_kv", attention=attention)
    expected = patched(name, "attention_kv")
    torch.testing.assert_close(encode(model, IDS, MASK), encode(expected, IDS, MASK))
    encoder = find(model).encoder
    outputs = encoder(IDS, attention_mask=MASK, output_hidden_states=True)
    assert len(outputs.hidden_states) == zoo.LAYERS + 1
    with pytest.raises(ValueError, match="output_attentions must be off"):
        encoder(IDS, attention_mask=MASK, output_attentions=True)
    if attention == "sdpa":
        model.set_attn_implementation("eager")
    encoder.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions must be off"):
        encoder(IDS, attention_mask=MASK)
    vk.set_ratio(model, 1)
    assert len(encoder(IDS, attention_mask=MASK).attentions) == zoo.LAYERS


@placed
@every
def test_short_and_empty(name, placement):
    """Sizes that are no multiple of anything, one token, none at all."""
    model = patched(name, placement)
    for n in (1, 2, 3, 4):
        ids = torch.full((2, n), 5)
        mask = torch.ones_like(ids)
        mask[1] = 0
        mask[1, -1] = 1
        assert encode(model, ids, mask).isfinite().all()
    x, mask = ragged(torch.float32)
    for rows, n in ((0, 5), (2, 0)):
        y = sublayer(model, x[:rows, :n], mask[:rows, :n])
        assert y.shape == (rows, n, zoo.D)
