"""The authors' released plugin files."""

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny

D, K, R = 24, 4, 6


def released(prefix="", bias=True, layers=2):
    generator = torch.Generator().manual_seed(5)
    parts = {}
    for i in range(layers):
        for name, shape in {
            "mux_layer": (K, K * D),
            "demux_adapter.w_in": (R, 2 * D),
            "demux_adapter.w_out": (D, R),
        }.items():
            key = f"{prefix}mux_layer.{i}.{name}"
            parts[f"{key}.weight"] = torch.randn(shape, generator=generator)
            if bias:
                parts[f"{key}.bias"] = torch.randn(shape[0], generator=generator)
    return parts


def save(parts, folder):
    torch.save(parts, folder / "plugin.pt")
    return folder / "plugin.pt"


@pytest.mark.parametrize("prefix", ["", "module.plugin."])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("patched", [True, False])
def test_loads(prefix, bias, patched, tmp_path):
    parts = released(prefix, bias)
    model = tiny.patched(ratios=(2, 4)) if patched else tiny.model()
    vk.load_plugins(model, save(parts, tmp_path))
    assert model.encoder.variator_state.ratio == K
    assert model.encoder.variator_state.kept[:3] == (0, 0, ())
    for i, block in enumerate(model.encoder.block):
        weights = block.layer[-1].plugins[str(K)].weights()
        for name, weight, b in (
            ("mux_layer", weights.merge_weight, weights.merge_bias),
            ("demux_adapter.w_in", weights.w1, weights.b1),
            ("demux_adapter.w_out", weights.w2, weights.b2),
        ):
            key = f"{prefix}mux_layer.{i}.{name}"
            assert torch.equal(weight, parts[f"{key}.weight"])
            assert torch.equal(b, parts[f"{key}.bias"] if bias else torch.zeros_like(b))
        assert weights.activation == "tanh"


def without(key):
    return {name: tensor for name, tensor in released().items() if name != key}


CHANGES = [
    ({"other": torch.ones(1)}, "unexpected key 'other'"),
    (released() | {"mux_layer.0.mux_layer.gain": torch.ones(1)}, "unexpected key"),
    (released() | released("a."), "under two prefixes"),
    (without("mux_layer.1.demux_adapter.w_in.weight"), r"missing keys \['ffn.1.*adapter.w1'\]"),
    (without("mux_layer.0.mux_layer.weight"), "lacks the weights"),
    (released() | {"mux_layer.1.mux_layer.weight": torch.ones(3, 3)}, "must have shape"),
    (released() | {"mux_layer.1.mux_layer.weight": 3}, "must be a tensor, got int"),
    (released(layers=3), "number of layers 3, the model has 2"),
    (released() | {"mux_layer.0.mux_layer.weight": torch.ones(4, 64)}, "hidden size 16"),
    ({}, "lacks the weights"),
    ([1], "must hold a dict, got list"),
]


@pytest.mark.parametrize(("content", "message"), CHANGES)
def test_refuses_other_content(content, message, tmp_path):
    path = save(content, tmp_path)
    for model in (tiny.model(), tiny.patched()):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            vk.load_plugins(model, path)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_refuses_a_patched_model_it_does_not_fit(tmp_path):
    path = save(released(), tmp_path)
    with pytest.raises(ValueError, match=r"ratios \[4\], the model has plugins for \(2,\)"):
        vk.load_plugins(tiny.patched(ratio=2, ratios=(2,)), path)
    with pytest.raises(ValueError, match="bottleneck 6, the model has 64"):
        vk.load_plugins(vk.patch(tiny.model()), path)


def test_runs_no_code_and_says_what_is_damaged(tmp_path):
    torch.save({"mux_layer.0.mux_layer.weight": print}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("not a pickle")
    (tmp_path / "empty.pt").write_text("")
    for name in ("code", "text", "empty"):
        with pytest.raises(ValueError, match="is not a file of tensors"):
            vk.load_plugins(tiny.model(), tmp_path / f"{name}.pt")
