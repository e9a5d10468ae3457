"""Packed weights follow their source: every way of changing a weight is noticed."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from tests.ops.cases import assert_close, cast, feed_forward, needs_cpu, plugin
from variator_kernels import functional as vf
from variator_kernels import packing
from variator_kernels.feed_forward import FeedForward

pytestmark = needs_cpu
D, F, K = 24, 40, 4


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(D, F, bias=False), nn.Linear(F, D, bias=False)
        self.plugin = nn.ParameterList(plugin(D, K, 8, torch.float32)[:6])

    def forward(self, x, backend="cpu"):
        p = plugin(D, K, 8, torch.float32)
        p = type(p)(*self.plugin)
        with torch.no_grad():
            return vf.compressed_ffn(
                x, p, FeedForward(self.wi.weight, self.wo.weight), backend=backend
            )


def halve_in_place(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)


def write_through_data(layer):
    for parameter in layer.parameters():
        parameter.data.mul_(0.5)


def replace_data(layer):
    for parameter in layer.parameters():
        parameter.data = parameter.data * 0.5


def load(layer):
    layer.load_state_dict({name: t * 0.5 for name, t in layer.state_dict().items()})


def assign(layer):
    layer.load_state_dict({n: t * 0.5 for n, t in layer.state_dict().items()}, assign=True)


def optimise(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def change_dtype(layer):
    layer.bfloat16().float()


@pytest.mark.parametrize(
    "change",
    [halve_in_place, write_through_data, replace_data, load, assign, optimise, change_dtype],
)
def test_changed_weights_are_packed_again(change):
    layer, x = Layer(), torch.randn(2, 19, D)
    before = layer(x)
    change(layer)
    after = layer(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, layer(x, "reference"), rtol=1e-4, atol=1e-5)


def test_unchanged_weights_are_packed_once():
    layer, x = Layer(), torch.randn(2, 19, D)
    layer(x)
    forms = {key: dict(entry.forms) for key, entry in packing.cache._entries.items()}
    assert (id(layer.wi.weight),) in forms
    layer(x)
    for key, found in forms.items():
        for kind, packed in found.items():
            assert packing.cache._entries[key].forms[kind] is packed


def test_the_cache_forgets_freed_weights():
    layer, x = Layer(), torch.randn(2, 19, D)
    layer(x)
    gc.collect()  # what earlier tests left
    size = len(packing.cache._entries)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), layer(x))
    assert len(packing.cache._entries) > size
    del twin
    gc.collect()
    assert len(packing.cache._entries) == size


def test_inference_tensors():
    with torch.inference_mode():
        layer, x = Layer(), torch.randn(2, 19, D)
        before = layer(x)
        halve_in_place(layer)
        assert not torch.equal(before, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_packed_linear(dtype, activation):
    from variator_kernels.feed_forward import activate

    ffn = feed_forward(D, F, dtype, "bert")
    x = torch.randn(7, D).to(dtype)

    def plain(x, w, b):
        y = nn.functional.linear(x, w, b)
        return y if activation == "none" else activate(y, activation)

    wide = cast(ffn, torch.double)
    linear = packing.linear(ffn.w_in, ffn.b_in)
    out = linear(x.to(packing.product_dtype(dtype)), activation)
    assert out.dtype == packing.product_dtype(dtype)
    assert_close(out, plain(x, ffn.w_in, ffn.b_in), plain(x.double(), wide.w_in, wide.b_in))


def test_nan_in_a_weight_shows():
    """oneDNN's ReLU would turn it into 0."""
    layer, x = Layer(), torch.randn(2, 19, D)
    with torch.no_grad():
        layer.wi.weight[0, 0] = float("nan")
    assert torch.isnan(layer(x)).all()


def test_stale_forms_are_dropped():
    layer, x = Layer(), torch.randn(2, 19, D)
    for _ in range(4):
        layer(x)
        halve_in_place(layer)
    layer(x)
    entry = packing.cache._entries[id(layer.wi.weight),]
    assert len(entry.forms) == 1 and entry.state == packing._state((layer.wi.weight,))
