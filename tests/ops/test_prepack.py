"""Packed weights follow their source: every way of changing a weight is noticed."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from tests.ops.cases import assert_close, cast, feed_forward, needs_cpu, plugin
from variator_kernels import functional as vf
from variator_kernels.ops import packed, packed_entries, prepack
from variator_kernels.ops.arguments import Norm
from variator_kernels.ops.feed_forward import FeedForward
from variator_kernels.ops.group_merge.op import group_merge
from variator_kernels.ops.make_groups import make_groups

pytestmark = [needs_cpu, pytest.mark.usefixtures("threads")]
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
    forms = {key: dict(entry.forms) for key, entry in prepack.cache._entries.all.items()}
    assert (packed_entries.layout(layer.wi.weight),) in forms
    layer(x)
    for key, found in forms.items():
        for kind, form in found.items():
            assert prepack.cache._entries.all[key].forms[kind] is form


def test_the_cache_forgets_freed_weights():
    layer, x = Layer(), torch.randn(2, 19, D)
    layer(x)
    gc.collect()  # what earlier tests left
    size = len(prepack.cache._entries.all)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), layer(x))
    assert len(prepack.cache._entries.all) > size
    del twin
    gc.collect()
    assert len(prepack.cache._entries.all) == size


def test_inference_tensors():
    with torch.inference_mode():
        layer, x = Layer(), torch.randn(2, 19, D)
        before = layer(x)
        halve_in_place(layer)
        assert not torch.equal(before, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_packed_linear(dtype, activation):
    from variator_kernels.ops.feed_forward import activate

    ffn = feed_forward(D, F, dtype, "bert")
    x = torch.randn(7, D).to(dtype)

    def plain(x, w, b):
        y = nn.functional.linear(x, w, b)
        return y if activation == "none" else activate(y, activation)

    wide = cast(ffn, torch.double)
    linear = prepack.linear(ffn.w_in, ffn.b_in)
    out = linear(x.to(prepack.product_dtype(dtype)), activation)
    assert out.dtype == prepack.product_dtype(dtype)
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
    entry = prepack.cache._entries.all[packed_entries.layout(layer.wi.weight),]
    assert len(entry.forms) == 1 and entry.changes == packed._changes(entry)


FIELDS = ("norm_weight", "norm_bias", "b_in", "b_out", "merge_bias", "b1", "b2", "w2")


@pytest.mark.parametrize("through_data", [False, True], ids=["version", "data"])
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_changed_vector_is_noticed(dtype, name, through_data):
    """Each source by itself, and the last of its elements alone: no sample may miss it."""
    p, ffn = plugin(D, 3, 8, dtype), feed_forward(D, F, dtype, "bert")
    ffn = ffn._replace(post_norm=False, norm="rms")
    x = torch.randn(2, 19, D).to(dtype)
    tensor = getattr(p, name, None) if hasattr(p, name) else getattr(ffn, name)
    with torch.no_grad():
        before = vf.compressed_ffn(x, p, ffn, backend="cpu")
        target = (tensor.data if through_data else tensor).view(-1)
        target[-1] = 3.0
        after = vf.compressed_ffn(x, p, ffn, backend="cpu")
        plain = vf.compressed_ffn(x, p, ffn, backend="reference")
        wide = [cast(values, torch.double) for values in (p, ffn)]
        truth = vf.compressed_ffn(x.double(), *wide, backend="reference")
    assert not torch.equal(before, after)
    assert_close(after, plain, truth)


def test_one_plugin_under_two_norms():
    """The norm is part of what is packed."""
    p, x = plugin(D, K, 8, torch.float32), torch.randn(2, 19, D)
    first = feed_forward(D, F, torch.float32, "t5")
    others = (
        first._replace(norm_weight=3 * first.norm_weight),
        first._replace(eps=0.5),
        first._replace(norm_weight=None),
        first._replace(norm_bias=torch.randn(D)),
        first._replace(norm="layer"),
    )
    with torch.no_grad():
        for _ in range(2):
            for ffn in (first, *others):
                wide = [cast(values, torch.double) for values in (p, ffn)]
                truth = vf.compressed_ffn(x.double(), *wide, backend="reference")
                plain = vf.compressed_ffn(x, p, ffn, backend="reference")
                assert_close(vf.compressed_ffn(x, p, ffn, backend="cpu"), plain, truth)


def test_nan_in_a_bias_shows():
    p, ffn = plugin(D, K, 8, torch.float32), feed_forward(D, F, torch.float32, "bert")
    ffn.b_in[0] = float("nan")
    with torch.no_grad():
        y = vf.compressed_ffn(torch.randn(2, 19, D), p, ffn._replace(activation="relu"))
    assert torch.isnan(y).all()


def test_a_changed_bias_leaves_the_weight_packed():
    weight, bias = torch.randn(F, D), torch.randn(F)
    before = prepack.linear(weight, bias).weight
    bias.add_(1)
    again = prepack.linear(weight, bias)
    assert again.weight is before and torch.equal(again.bias, bias)


def test_an_empty_projection():
    x, p = torch.randn(2, 9, D), plugin(D, K, 8, torch.float32)
    merge, norm = p.merge._replace(projection=torch.empty(0, D)), Norm("rms", torch.randn(D))
    _, projected, _ = group_merge(x, merge, make_groups(x, p.ratio), norm, "cpu")
    assert projected.shape == (2, 9, 0)
