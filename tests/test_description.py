"""describe: what holds, in words."""

import pytest
import torch

import variator_kernels as vk
from tests.ops.cases import needs_cpu
from tests.sites import tiny
from variator_kernels import description


def facts(model):
    return dict(description.lines(model))


@needs_cpu
def test_says_what_holds():
    model = tiny.patched(ratio=4, keep_first=1, keep_last=2, keep=(7, 3))
    assert vk.describe(model) == "\n".join(
        [
            "family        t5, hidden size 24",
            "method        variator, bottleneck 6, tanh",
            "sites         ffn: 2 layers",
            "ratios        2, 4",
            "level         4",
            "backend       cpu for float32 on cpu (auto)",
            "plugins       2,820 parameters, 11,280 bytes",
            "kept whole    first 1, last 2, ids 3, 7",
            "packed        none yet",
            "precision     float32, the model's own",
            "trained, k=2  yes",
            "trained, k=4  yes",
        ]
    )
    with torch.no_grad():
        tiny.encode(model, *tiny.batch(19, 7))
    assert "MiB; of their originals " in facts(model)["packed"]
    assert sum(p.numel() for p in vk.plugin_parameters(model)) == 2820


def test_follows_level_backend_and_masks():
    model = tiny.patched("bert", "gelu", backend="reference").to(torch.bfloat16)
    assert facts(model)["backend"] == "reference for bfloat16 on cpu"
    with vk.use_ratio(model, {"ffn": {-1: 2}}):
        assert facts(model)["level"] == "{'ffn': {1: 2}}, other layers dense"
    with vk.use_ratio(model, 1), vk.keep(model, torch.ones(1, 1)):
        assert facts(model)["level"] == "1 (dense)"
        assert facts(model)["kept whole"] == "first 0, last 0, those of vk.keep's mask"
    assert facts(model)["kept whole"] == "first 0, last 0"


def test_a_backend_that_cannot_run_is_an_answer():
    model = tiny.patched(backend="reference")
    config = tiny.encoder(model).variator_state.method
    config.config = config.config._replace(backend="cuda", pack=False)
    assert facts(model)["packed"] == "nothing: pack=False"
    assert facts(model)["backend"].startswith("none for float32 on cpu: backend 'cuda' cannot run")


def test_tells_trained_from_untrained():
    model = vk.patch(tiny.model(), ratios=(2, 4), bottleneck=6)
    assert [facts(model)[f"trained, k={k}"] for k in (2, 4)] == ["no", "no"]
    with torch.no_grad():
        tiny.layers(model)[1].plugins["2"].adapter.w2[0, 0] = 1
    assert [facts(model)[f"trained, k={k}"] for k in (2, 4)] == ["1 of 2 sites", "no"]
    with torch.device("meta"):
        empty = vk.patch(tiny.model(), ratios=(2,), bottleneck=6)
    assert facts(empty.to("meta"))["trained, k=2"] == "not known: not all values are here"


def test_layers_that_are_one_module():
    model = tiny.model("bert", "gelu")
    model.encoder.layer[1] = model.encoder.layer[0]
    vk.patch(model)
    assert facts(model)["sites"] == "ffn: 2 layers, 1 modules"


def test_changes_nothing():
    model = tiny.patched(keep=(3,))
    before = tiny.snapshot(model)
    vk.describe(model)
    assert tiny.snapshot(model) == before


def test_refuses_what_is_not_patched():
    with pytest.raises(ValueError, match="model is not patched"):
        vk.describe(tiny.model())
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        vk.describe(3)


def test_several_encoders_are_described_one_by_one():
    both = torch.nn.ModuleList([tiny.patched(), tiny.patched("bert", "gelu")])
    text = vk.describe(both)
    assert "encoder       0.encoder\nfamily        t5," in text
    assert "\n\nencoder       1\nfamily        bert," in text
