"""Gradients where attention is compressed: kernels, checkpointing, dropout, T5's table."""

import copy

import pytest
import torch

import variator_kernels as vk
from tests.ops.cases import CPU
from tests.sites import tiny, zoo
from tests.sites.attention_cases import encode, every, patched, placed, ragged, sublayer
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BACKENDS = ["reference"] if CPU is None else ["auto", "reference"]


def gradients(model, loss, *more):
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, [*parameters.values(), *more], allow_unused=True)
    return dict(zip([*parameters, *(f"input{i}" for i in range(len(more)))], found, strict=True))


@placed
@every
@pytest.mark.parametrize("left", [False, True])
def test_kernels_and_reference_agree(name, placement, left):
    """Plugins, base weights, hidden states, T5's table; NaN in padding reaches none of them."""
    found = []
    x, mask = ragged(left=left)
    for backend in ("auto", "reference"):
        model = patched(name, placement, backend=backend, keep_first=1).double().train()
        for number in (0, 1):
            h = x.clone().requires_grad_()
            y = sublayer(model, h, mask, number)
            loss = (y[mask] * torch.arange(1, zoo.D + 1)).square().sum()
            layer = find(model).attentions[number]
            found.append(gradients(layer, loss, h) | {"y": y[mask]})
            table = layer.variator_reach.table
            if table is not None:
                y = sublayer(model, x, mask, number)
                found[-1]["table"] = torch.autograd.grad(y[mask].square().sum(), table.weight)[0]
    for auto, reference in zip(found[:2], found[2:], strict=True):
        for key, expected in reference.items():
            if ".plugins.2." in f".{key}":
                assert expected is None, key
                continue
            if expected is None and "norm" not in key.lower() and "table" not in key:
                assert auto[key] is None, key
                continue
            if expected is None:
                continue
            assert expected.isfinite().all(), key
            torch.testing.assert_close(auto[key], expected, atol=1e-9, rtol=1e-9, msg=key)
        assert (auto["input0"][~mask] == 0).all()


@placed
@pytest.mark.parametrize(
    "name", ["bert", "t5", "modernbert", "bart", "eurobert", "deberta-v2", "layoutlmv3"]
)
def test_gradcheck(name, placement):
    model = patched(name, placement, keep_first=1).double().requires_grad_(False)
    x, mask = ragged()
    real = torch.randn(int(mask.sum()), zoo.D, dtype=torch.float64, requires_grad=True)
    layer = find(model).attentions[1]
    names = [n for n, _ in layer.named_parameters() if ".3." in n]
    values = [layer.get_parameter(n).detach().requires_grad_() for n in names]

    def run(real, *values):
        for key, value in zip(names, values, strict=True):
            owner = layer.get_submodule(key.rpartition(".")[0])
            owner._parameters[key.rpartition(".")[2]] = value
        h = x.masked_scatter(mask[..., None], real)
        return sublayer(model, h, mask, 1)[mask]

    assert torch.autograd.gradcheck(run, (real, *values), fast_mode=True)


@placed
@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, placement, reentrant):
    """The same loss and gradients, the level of the forward, though it is another in backward."""
    if name in ("mpnet", "layoutlmv3"):
        pytest.skip(f"transformers itself has no checkpointing for {name}")
    found = []
    ids, mask = tiny.batch(9, 4)
    for checkpointed in (False, True):
        model = patched(name, "ffn", placement, keep_first=1).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for attribute in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
        if checkpointed:
            settings = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
            model.enable_input_require_grads()
        with vk.use_ratio(model, {"ffn": 2, placement: 3}), vk.keep(model, ids == 5):
            loss = encode(model, ids, mask)[mask > 0].square().sum()
        loss.backward()
        encoder = find(model).encoder
        grads = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    (loss, plain), (again, checked) = found
    torch.testing.assert_close(again, loss)
    assert plain.keys() == checked.keys()
    for key, value in plain.items():
        torch.testing.assert_close(checked[key], value, atol=1e-3, rtol=1e-4, msg=key)


@placed
@every
def test_dropout_drops(name, placement):
    """In training weights and outputs drop; with the same seed the same ones; in eval none."""
    own = {
        "t5": {"config_dropout_rate": 0.5},
        "umt5": {"config_dropout_rate": 0.5},
        "longt5": {"config_dropout_rate": 0.5},
        "bart": {"config_attention_dropout": 0.5, "config_dropout": 0.0},
        "distilbert": {"config_attention_dropout": 0.5, "config_dropout": 0.0},
        "eurobert": {"config_attention_dropout": 0.5},
        "modernbert": {"config_attention_dropout": 0.5},
    }.get(name, {"config_attention_probs_dropout_prob": 0.5, "config_hidden_dropout_prob": 0.0})
    model = patched(name, placement, **own)
    x, mask = ragged(torch.float32)
    expected = sublayer(model, x, mask)[mask]
    assert torch.equal(sublayer(model, x, mask)[mask], expected)
    model.train()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(sublayer(model, x, mask)[mask])
        assert found[-1].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3)
    if not find(model).family.attention.post_norm:  # a norm behind moves the mean
        torch.manual_seed(0)
        times = mask.repeat(300, 1)  # rows drop on their own
        many = sublayer(model, x.repeat(300, 1, 1), times)[times].detach()
        many = many.view(300, *expected.shape)
        error = many.mean(0) - expected
        assert (error.abs() < 6 * many.std(0) / 300**0.5 + 1e-4).float().mean() > 0.99
    model.eval()
    assert torch.equal(sublayer(model, x, mask)[mask], expected)


@placed
def test_a_trained_table_is_trained(placement):
    """T5's terms change under an optimiser: no forward keeps those of an earlier one."""
    model = patched("t5", placement)
    table = find(model).attentions[0].variator_reach.table.weight
    ids, mask = tiny.batch(9, 4)
    before = encode(model, ids, mask)
    before.square().sum().backward()
    assert table.grad.abs().max() > 0
    with torch.no_grad():
        table -= 0.5 * table.grad.sign()
    assert not torch.allclose(encode(model, ids, mask), before, atol=1e-3)
    table.requires_grad_(False)
    frozen = encode(model, ids, mask)
    with torch.no_grad():
        table.normal_()
    assert not torch.allclose(encode(model, ids, mask), frozen, atol=1e-3)
    assert torch.equal(encode(copy.deepcopy(model), ids, mask), encode(model, ids, mask))
