"""What people do around a model whose attention is compressed: wrong at worst by an error."""

import copy
import io
import pickle
import threading

import pytest
import torch
import transformers

import variator_kernels as vk
from tests.sites import tiny, zoo
from tests.sites.attention_cases import (
    encode,
    every,
    patched,
    placed,
    ragged,
    sublayer,
    turned,
)
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore")
IDS, MASK = tiny.batch(9, 4)


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
