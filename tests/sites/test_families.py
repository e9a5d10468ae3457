"""describe(): what an FFN sublayer consists of."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import variator_kernels as vk
from tests.sites import tiny, zoo
from variator_kernels.ops.feed_forward import normalize, products
from variator_kernels.sites.families import FAMILIES
from variator_kernels.sites.family import follow, is_a
from variator_kernels.sites.feed_forward import describe
from variator_kernels.sites.find import find


def sublayer(*args, **settings):
    return tiny.layers(tiny.model(*args, **settings))[0]


def run(layer, x):
    ffn = describe(layer)
    norm = (ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)
    if ffn.norm == "none":
        return products(x, ffn)
    if ffn.post_norm:
        return normalize(x + products(x, ffn), *norm)
    return x + products(normalize(x, *norm), ffn)


ACTS = [
    *tiny.VARIANTS,
    ("t5", "gelu"),
    ("t5", "gated-gelu_pytorch_tanh"),
    ("bert", "gelu_new"),
    ("electra", "gelu"),
    ("distilbert", "relu"),
    ("roberta", "silu"),
]


@pytest.mark.parametrize(("family", "act"), ACTS)
def test_describes_plain_products(family, act):
    layer = sublayer(family, act)
    x = torch.randn(2, 5, 24)
    assert describe(layer).module is None
    torch.testing.assert_close(run(layer, x), tiny.run(layer, x), atol=1e-5, rtol=1e-5)


def row(layer):
    """The family, the module around the first product, and that product's name there."""
    family = next(f for f in FAMILIES.values() if is_a(layer, f, f.layer))
    path, _, name = family.w_in[0].rpartition(".")
    return family, follow(layer, path), name


def set_activation(layer, act):
    path, _, name = row(layer)[0].act.rpartition(".")
    setattr(follow(layer, path), name, act)


def replace(layer):
    _, container, name = row(layer)
    setattr(container, name, type("Other", (nn.Linear,), {})(24, 40))


def hook(layer):
    w_out = follow(layer, row(layer)[0].w_out)
    w_out.register_forward_hook(lambda module, args, out: 2 * out)


def hook_the_whole(layer):
    step = follow(layer, row(layer)[0].steps[0])
    step.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def parametrise(layer):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    _, container, name = row(layer)
    parametrize.register_parametrization(getattr(container, name), "weight", Twice())


def bind_forward(layer):
    layer.DenseReluDense.wi.forward = torch.tanh


def quantise(layer):
    torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8, inplace=True)


def unknown_activation(layer):
    set_activation(layer, nn.Hardswish())


def other_activation_of_a_known_name(layer):
    set_activation(layer, type("ReLU", (nn.Hardswish,), {"__module__": "elsewhere"})())


def hooked_activation(layer):
    act = follow(layer, row(layer)[0].act)
    act.register_forward_hook(lambda module, args, out: 2 * out)


CHANGES = [
    replace,
    hook,
    hook_the_whole,
    parametrise,
    quantise,
    unknown_activation,
    other_activation_of_a_known_name,
    hooked_activation,
]


@pytest.mark.parametrize("family", ["t5", "bert", "distilbert"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_runs_the_module_where_weights_do_not_tell_all(change, family):
    layer = sublayer(family)
    change(layer)
    x = torch.randn(2, 5, 24)
    assert describe(layer).module is not None
    torch.testing.assert_close(run(layer, x), tiny.run(layer, x))
    assert vk.CompressedFFN(layer).plugin.adapter.b2.shape == (24,)


def test_runs_the_module_where_forward_is_replaced(monkeypatch):
    layer = sublayer()
    bind_forward(layer)
    assert describe(layer).module is layer.DenseReluDense
    layer = sublayer()
    monkeypatch.setattr(type(layer.DenseReluDense), "forward", lambda self, x: 3 * x)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(run(layer, x), layer(x))


def test_dropout_only_in_training():
    layer = sublayer(dropout=0.25)
    assert (describe(layer).dropout_inner, describe(layer).dropout_outer) == (0.0, 0.0)
    layer.train()
    assert (describe(layer).dropout_inner, describe(layer).dropout_outer) == (0.25, 0.25)
    layer = sublayer("bert", "gelu", dropout=0.25).train()
    assert (describe(layer).dropout_inner, describe(layer).dropout_outer) == (0.0, 0.25)


def test_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match=r"ffn must be an FFN sublayer of a known family.*Linear"):
        describe(nn.Linear(2, 2))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_names_exist_in_transformers(name):
    made, family = zoo.plain(name), zoo.family(name)
    assert made.config.model_type == family.name
    for part, kind in find(made).parts():
        assert type(part).__name__ == kind
        assert type(part).__module__ == family.module
    layer = find(made).layers[0]
    if family.norm:
        assert type(follow(layer, family.norm)).__name__ == family.norm_class
    if family.container:
        assert type(follow(layer, family.container)).__name__ in family.container_classes
    assert getattr(made.config, family.inner_size) == 40
