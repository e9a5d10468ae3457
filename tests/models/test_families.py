"""describe(): what an FFN sublayer consists of."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.models import tiny
from variator_kernels.feed_forward import normalize, products
from variator_kernels.models.families import FAMILIES, describe


def sublayer(*args, **settings):
    return tiny.model(*args, **settings).encoder.block[0].layer[-1]


def run(layer, x):
    ffn = describe(layer)
    return x + products(normalize(x, ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps), ffn)


ACTS = [*tiny.VARIANTS, ("t5", "gelu"), ("t5", "gated-gelu_pytorch_tanh")]


@pytest.mark.parametrize(("family", "act"), ACTS)
def test_describes_plain_products(family, act):
    layer = sublayer(family, act)
    x = torch.randn(2, 5, 24)
    assert describe(layer).module is None
    torch.testing.assert_close(run(layer, x), layer(x), atol=1e-5, rtol=1e-5)


def replace(layer):
    layer.DenseReluDense.wi = type("Other", (nn.Linear,), {})(24, 40)


def hook(layer):
    layer.DenseReluDense.wo.register_forward_hook(lambda module, args, out: 2 * out)


def hook_the_whole(layer):
    layer.DenseReluDense.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def parametrise(layer):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(layer.DenseReluDense.wi, "weight", Twice())


def bind_forward(layer):
    layer.DenseReluDense.wi.forward = torch.tanh


def quantise(layer):
    layer.DenseReluDense = torch.ao.quantization.quantize_dynamic(
        layer.DenseReluDense, {nn.Linear}, dtype=torch.qint8
    )


def unknown_activation(layer):
    layer.DenseReluDense.act = nn.Hardswish()


def other_activation_of_a_known_name(layer):
    layer.DenseReluDense.act = type("ReLU", (nn.Hardswish,), {"__module__": "elsewhere"})()


CHANGES = [
    replace,
    hook,
    hook_the_whole,
    parametrise,
    quantise,
    unknown_activation,
    other_activation_of_a_known_name,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_runs_the_module_where_weights_do_not_tell_all(change):
    layer = sublayer()
    change(layer)
    x = torch.randn(2, 5, 24)
    assert describe(layer).module is layer.DenseReluDense
    torch.testing.assert_close(run(layer, x), layer(x))


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


def test_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match=r"ffn must be an FFN sublayer of a known family.*Linear"):
        describe(nn.Linear(2, 2))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_names_exist_in_transformers(family):
    made = tiny.model(family.name)
    assert made.config.model_type == family.name
    block = made.encoder.block[0]
    for part, name in ((made.encoder, family.encoder), (block, family.block)):
        assert type(part).__name__ == name
        assert type(part).__module__ == family.module
    assert type(block.layer[-1]).__name__ == family.layer
    assert type(block.layer[-1].layer_norm).__name__ == family.norm_class
    assert type(block.layer[-1].DenseReluDense).__name__ in family.dense_classes
