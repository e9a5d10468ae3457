"""Models whose frozen products run in int8, and the same model in float64 with the definition of
such a product in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.decoders import tiny as decoders
from tests.ops.cases import needs_cpu
from tests.sites import tiny, zoo
from variator_kernels.ops import int8_linear
from variator_kernels.ops.int8_linear import module, reference
from variator_kernels.ops.int8_linear.module import Linear
from variator_kernels.sites.find import find
from variator_kernels.sites.install import products_of

marks = [
    needs_cpu,
    pytest.mark.skipif(
        int8_linear.kernel() is None, reason=f"int8 products: {int8_linear.describe()}"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
BOTH = {"ffn": 2, "attention_kv": 3}
OFF = 3e-3
"""How far outputs may be from the definition in float64, as a part of their size: rounding to whole
numbers makes a last bit a step of a 127th now and then. int8 itself costs far more."""
FFN_ALONE = ["albert", "longformer", "deberta-v2", "longt5"]
FAMILIES = ["t5", "mt5", "bert", "bart", "mpnet", "modernbert", "eurobert", *FFN_ALONE]
DECODERS = ["llama", "qwen3", "phi3", "gemma"]


class Defined(nn.Module):
    """A linear layer by the definition of its product in int8."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().double(), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().double())
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        levels = int8_linear.kernel().levels
        if not len(rows):
            return x.new_empty(*x.shape[:-1], self.out_features)
        y = reference.int8_linear(rows, self.weight, self.bias, levels=levels)
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def plain(name: str, dtype=torch.float32):
    """A family's model that is not patched."""
    if name not in decoders.FAMILIES and not zoo.installed(name):
        pytest.skip(f"this version of transformers has no {name}")
    if name in decoders.FAMILIES:
        return decoders.model(name, dtype=dtype).requires_grad_(False)
    return zoo.plain(name).requires_grad_(False).to(dtype)


def patch(model, *arguments, **settings):
    """``vk.patch``; skips where this version of transformers has other modules."""
    try:
        return vk.patch(model, *arguments, **settings)
    except ValueError as error:
        if "another version of transformers" in str(error):
            pytest.skip(str(error))
        raise


def pair(name: str, ratio=None, dtype=torch.float32, **settings):
    """A family's patched model with ``precision="int8"``, and the one without."""
    model = plain(name, dtype)
    exact = copy.deepcopy(model)
    ratio = BOTH if ratio is None else ratio
    settings = {"keep_first": 1} | settings
    ratios = {p: (k,) for p, k in ratio.items()} if isinstance(ratio, dict) else (ratio,)
    patch(model, ratio, ratios, 6, precision="int8", **settings)
    vk.patch(exact, ratio, ratios, 6, **settings)
    for made in (model, exact):
        tiny.train_plugins(made)
    return model, exact


def defined(exact):
    """The model without int8 in float64, with the definition in the place of its products."""
    truth = copy.deepcopy(exact).double()
    state = find(truth).encoder.variator_state
    for _, site in state.own_sites:
        products = products_of(find(truth), site)
        names = {id(module): name for name, module in find(truth).at(site).named_modules()}
        for product in products:
            if type(product) is nn.Linear:
                find(truth).at(site).set_submodule(names[id(product)], Defined(product))
    return truth


def forward(model, ids, mask):
    """Hidden states of the encoder, or the decoder, on real tokens."""
    given = {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
    decoder = find(model).family.decoder
    given = given if decoder else tiny.positions(model, mask) if hasattr(model, "config") else {}
    out = find(model).encoder(ids, attention_mask=mask, **given).last_hidden_state
    return out[mask.bool()]


def distance(found, expected) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def swapped(model):
    return [module for module in model.modules() if type(module) is Linear]


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    """The models here are smaller than what is worth it."""
    monkeypatch.setattr(module, "LEAST", 1)


def ratio_of(name):
    return {"ffn": 2} if name in FFN_ALONE else None


def ready(name="bert", **settings):
    model, exact = pair(name, ratio_of(name), **settings)
    return model, exact, tiny.batch(19, 7, 12)
