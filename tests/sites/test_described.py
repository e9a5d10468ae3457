"""The description of a sublayer is kept between calls, and made anew whenever it would differ."""

import copy
import pickle

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.sites import feed_forward
from variator_kernels.sites.family import follow, lookup
from variator_kernels.sites.feed_forward import DescribedFeedForward, describe


@pytest.fixture
def counted(monkeypatch):
    """How often a description was made."""
    calls = []
    real = feed_forward._watched
    monkeypatch.setattr(
        feed_forward, "_watched", lambda layer, family: calls.append(layer) or real(layer, family)
    )
    return calls


def part(layer, name):
    family = feed_forward.family_of(layer)
    paths = {"in": family.w_in, "out": (family.w_out,), "norm": (family.norm,)}[name]
    return next(found for path in paths if (found := lookup(layer, path)) is not None)


def replaced(layer, path):
    """Another linear layer in the place of ``path``."""
    parent, _, name = path.rpartition(".")
    old = follow(layer, path)
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    setattr(follow(layer, parent), name, new)


CHANGES = {
    "weight": lambda layer: setattr(
        part(layer, "out"), "weight", nn.Parameter(torch.randn_like(part(layer, "out").weight))
    ),
    "linear": lambda layer: replaced(layer, feed_forward.family_of(layer).w_out),
    "hook": lambda layer: part(layer, "in").register_forward_hook(lambda *_: None),
    "pre-hook": lambda layer: part(layer, "out").register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: part(layer, "out").register_full_backward_hook(lambda *_: None),
    "forward": lambda layer: setattr(part(layer, "in"), "forward", part(layer, "in").forward),
    "training": lambda layer: layer.train(),
    "dropout": lambda layer: setattr(
        follow(layer, feed_forward.family_of(layer).outer_dropout), "p", 0.25
    ),
    "parametrization": lambda layer: nn.utils.parametrizations.weight_norm(part(layer, "out")),
}


@pytest.mark.parametrize("family", list(tiny.PREFIX))
@pytest.mark.parametrize("change", list(CHANGES))
def test_changes_are_seen(family, change, counted):
    act = "relu" if family in ("t5", "mt5", "umt5") else "gelu"
    layer = tiny.layers(tiny.model(family, act, dropout=0.125))[0].eval()
    kept = DescribedFeedForward()
    first = kept.of(layer)
    assert kept.of(layer) is first and len(counted) == 1
    CHANGES[change](layer)
    now = kept.of(layer)
    assert len(counted) == 2
    for ours, wanted in zip(now[:-1], describe(layer)[:-1], strict=True):
        if isinstance(ours, torch.Tensor):  # a parametrised weight is another one at each look
            wanted, ours = wanted.shape, ours.shape
        assert ours == wanted
    assert now.module is not None or now.w_out is describe(layer).w_out
    assert (now.module is None) == (describe(layer).module is None)
    if change != "parametrization":  # such a weight is computed at each look, so not kept
        assert kept.of(layer) is now and len(counted) == 2


def test_a_parametrised_weight_is_never_kept(counted):
    """It is computed at each look: a kept one would be of the past, and a graph walked twice."""
    layer = tiny.layers(tiny.model())[0]
    nn.utils.parametrize.register_parametrization(layer.layer_norm, "weight", nn.Softplus())
    kept = DescribedFeedForward()
    first = kept.of(layer).norm_weight.detach().clone()
    with torch.no_grad():
        layer.layer_norm.parametrizations.weight.original.add_(1)
    assert not torch.equal(kept.of(layer).norm_weight, first)


def swapped_activation(plugin):
    plugin.adapter.activation = "identity"


def new_merge(plugin):
    plugin.merge = vk.GroupMerge(24, 2)


def new_weight(plugin):
    plugin.adapter.w2 = nn.Parameter(torch.ones_like(plugin.adapter.w2))


def plain_attribute(plugin):
    weight = plugin.adapter.w2.detach() + 1
    del plugin.adapter.w2
    plugin.adapter.w2 = weight


def parametrised(plugin):
    nn.utils.parametrize.register_parametrization(plugin.adapter, "w2", nn.Softplus())


def parametrised_and_trained(plugin):
    """Handled in the test: parametrised, run, then changed."""


@pytest.mark.parametrize("change", [swapped_activation, new_merge, new_weight, plain_attribute,
                                    parametrised, parametrised_and_trained])  # fmt: skip
def test_changes_of_a_plugin_are_seen(change):
    model = tiny.patched(ratio=2)
    ids, mask = tiny.batch(9, 4)
    plugin = model.encoder.block[0].layer[-1].plugins["2"]
    with torch.no_grad():
        tiny.encode(model, ids, mask)
        if change is parametrised_and_trained:
            parametrised(plugin)
            tiny.encode(model, ids, mask)
            plugin.adapter.parametrizations.w2.original.add_(1)
        else:
            change(plugin)
        ours = tiny.encode(model, ids, mask)
        plugin.prepared = type(plugin.prepared)()
        assert torch.equal(tiny.encode(model, ids, mask), ours)


def test_what_is_refused_stays_refused(counted):
    layer = tiny.layers(tiny.model())[0]
    kept = DescribedFeedForward()
    kept.of(layer)
    handle = layer.layer_norm.register_forward_hook(lambda *_: None)
    for _ in range(2):
        with pytest.raises(TypeError, match="layer_norm of T5LayerFF was replaced or hooked"):
            kept.of(layer)
    handle.remove()
    assert kept.of(layer).norm == "rms"


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_replicas_of_data_parallel_have_their_own(family):
    """They share what lies in a module's dict, this too."""
    model = tiny.patched(family, "gelu", ratio=2)
    layer = tiny.layers(model)[0]
    x = torch.randn(2, 9, 24)
    with torch.no_grad():
        before = tiny.run(layer, x)
        replica = layer._replicate_for_data_parallel()
        replica._modules = {}
        for name, child in copy.deepcopy(layer)._modules.items():
            for parameter in child.parameters():
                parameter.add_(0.5)
            replica._modules[name] = child
        assert vars(replica)["variator_described"] is vars(layer)["variator_described"]
        changed = tiny.run(replica, x)
        fresh = copy.deepcopy(layer)
        for parameter in fresh.parameters():
            parameter.add_(0.5)
        assert torch.equal(changed, tiny.run(fresh, x)) and not torch.equal(changed, before)
        assert torch.equal(tiny.run(layer, x), before)


def test_copies_start_empty(counted):
    kept = DescribedFeedForward()
    kept.of(tiny.layers(tiny.model())[0])
    for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert twin._kept is None


def test_a_layer_is_described_once_a_change_not_once_a_call(counted):
    model = tiny.patched()
    ids, mask = tiny.batch(9, 4)
    for _ in range(3):
        for k in (2, 4):
            with vk.use_ratio(model, k), torch.no_grad():
                tiny.encode(model, ids, mask)
    assert len(counted) == 2  # layers
    vk.unpatch(model)
    assert not any("variator" in name for m in model.modules() for name in vars(m))


def test_groups_are_made_once_a_forward(monkeypatch):
    from variator_kernels.runtime import context

    made = []
    real = context.make_groups
    monkeypatch.setattr(context, "make_groups", lambda *a, **b: made.append(a[1]) or real(*a, **b))
    model = tiny.patched()
    ids, mask = tiny.batch(9, 4)
    for level, ratios in ((2, [2]), ({"ffn": {0: 4, 1: 2}}, [4, 2]), (1, [])):
        made.clear()
        with vk.use_ratio(model, level), torch.no_grad():
            tiny.encode(model, ids, mask)
        assert made == ratios
