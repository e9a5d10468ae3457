"""The modules: parameters, initial values, copies, and what their constructors refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.sites import tiny

D, K, R = 12, 4, 5


def modules(**factory):
    layer = tiny.model().encoder.block[0].layer[-1]
    return {
        "merge": (vk.GroupMerge(D, K, **factory), (torch.randn(2, 9, D),)),
        "adapter": (
            vk.AdapterDecompress(D, K, R, **factory),
            (torch.randn(2, 3, D), torch.randn(2, 9, D)),
        ),
        "ffn": (vk.CompressedFFN(layer, K, R, **factory), (torch.randn(2, 9, 24),)),
    }


NAMES = ["merge", "adapter", "ffn"]


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_state_dicts(name):
    module, inputs = modules()[name]
    expected = randomise(module)(*inputs)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(*inputs), expected)
    other, _ = modules()[name]
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*inputs), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(name, dtype):
    module, inputs = modules()[name]
    module = randomise(module).to(dtype)
    out = module(*(x.to(dtype) for x in inputs))
    assert out.dtype == dtype
    made, _ = modules(dtype=dtype, device="meta")[name]
    own = getattr(made, "plugin", made)
    assert {(p.dtype, p.device.type) for p in own.parameters()} == {(dtype, "meta")}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    module, inputs = modules()[name]
    randomise(module)(*inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_names_and_shapes():
    plugin = vk.Plugin(D, K, R)
    assert {name: list(p.shape) for name, p in plugin.named_parameters()} == {
        "merge.weight": [K, K * D],
        "merge.bias": [K],
        "adapter.w1": [R, 2 * D],
        "adapter.b1": [R],
        "adapter.w2": [D, R],
        "adapter.b2": [D],
    }
    assert plugin.weights().ratio == K
    assert plugin.weights().w1 is plugin.adapter.w1
    assert "ratio=4" in repr(plugin)
    assert "12, ratio=4, bottleneck=5, activation='tanh'" in repr(plugin)


def test_initial_values_are_mean_and_copy():
    plugin = vk.Plugin(D, K, R)
    x, u = torch.randn(1, 8, D), torch.randn(1, 2, D)
    means = x.unflatten(1, (2, K)).mean(2)
    torch.testing.assert_close(plugin.merge(x), means, atol=1e-6, rtol=1e-5)
    assert torch.equal(plugin.adapter(u, x), u.repeat_interleave(K, 1))
    assert plugin.adapter.w1.abs().max() <= (2 * D) ** -0.5
    assert plugin.adapter.w1.std() > 0.3 * (2 * D) ** -0.5


def test_activation_and_mask_are_passed_on():
    x, u = torch.randn(2, 9, D), torch.randn(2, 3, D)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :5] = False
    torch.manual_seed(0)
    tanh = randomise(vk.AdapterDecompress(D, K, R))
    plain = vk.AdapterDecompress(D, K, R, "identity")
    plain.load_state_dict(tanh.state_dict())
    assert not torch.allclose(tanh(u, x), plain(u, x), atol=1e-3)
    assert not tanh(u, x, mask)[0, :5].any()
    merge = randomise(vk.GroupMerge(D, K))
    torch.testing.assert_close(merge(x, mask)[0, 0], merge(x[:1, 5:])[0, 0])


def test_compressed_ffn_is_the_patched_sublayer():
    model = tiny.patched()
    patched = model.encoder.block[0].layer[-1]
    plugin = patched.plugins["4"]
    x, mask = torch.randn(2, 9, 24), tiny.batch(9, 4)[1]
    expected = vk.functional.compressed_ffn(
        x, plugin.weights(), vk.CompressedFFN(patched).feed_forward(), mask=mask
    )
    module = vk.CompressedFFN(tiny.model().encoder.block[0].layer[-1], 4, 6)
    module.plugin.load_state_dict(plugin.state_dict())
    assert torch.equal(module(x, mask), expected)
    assert torch.equal(module(x[:1])[0], patched(x[:1])[0])


def test_compressed_ffn_takes_any_object_that_tells_its_products():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(D, 20), nn.Linear(20, D)

        def feed_forward(self):
            return vk.FeedForward(
                self.inner.weight,
                self.outer.weight,
                b_in=self.inner.bias,
                b_out=self.outer.bias,
                activation="gelu",
            )

    module = vk.CompressedFFN(Own(), 2)
    assert module.plugin.merge.hidden_size == D
    x = torch.randn(1, 4, D)
    means = x.unflatten(1, (2, 2)).mean(2)
    out = module.ffn.outer(nn.functional.gelu(module.ffn.inner(means)))
    expected = x + out.repeat_interleave(2, 1)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="ffn must be an FFN sublayer of a known family"):
        vk.CompressedFFN(nn.Linear(D, D))


BAD = [
    ({"hidden_size": 0}, "hidden_size must be >= 1, got 0"),
    ({"hidden_size": 1.5}, "hidden_size must be an integer >= 1, got 1.5"),
    ({"ratio": 1}, "ratio must be >= 2, got 1"),
    ({"ratio": float("nan")}, "ratio must be an integer >= 2, got nan"),
    ({"bottleneck": -1}, "bottleneck must be >= 1, got -1"),
    ({"bottleneck": True}, "bottleneck must be an integer >= 1, got True"),
    ({"activation": "gelu"}, "activation must be one of .* got 'gelu'"),
    ({"backend": "fast"}, "backend must be one of .* got 'fast'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_refuses_bad_arguments(arguments, message):
    given = {"hidden_size": D, "ratio": K, **arguments}
    with pytest.raises(ValueError, match=message):
        vk.AdapterDecompress(**given)
    if given.keys() <= {"hidden_size", "ratio", "backend"}:
        with pytest.raises(ValueError, match=message):
            vk.GroupMerge(**given)
    if "backend" not in given:
        with pytest.raises(ValueError, match=message):
            vk.Plugin(**given)
    if not arguments.keys() & {"hidden_size"}:
        with pytest.raises(ValueError, match=message):
            vk.CompressedFFN(tiny.model().encoder.block[0].layer[-1], **{"ratio": K, **arguments})


def test_compressed_ffn_keeps_tokens_whole():
    layer = tiny.model().encoder.block[0].layer[-1].double()
    module = randomise(vk.CompressedFFN(layer, K, R))
    x, further = torch.randn(2, 9, 24).double(), torch.zeros(2, 9)
    further[1, 5] = 1
    out = module(x, keep_first=1, keep_last=2, keep=further)
    whole = further.bool()
    whole[:, [0, 7, 8]] = True
    same = (out - layer(x)).abs().amax(-1) < 1e-5  # T5 norms in fp32
    assert torch.equal(same, whole)
