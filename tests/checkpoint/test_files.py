"""Plugin files: our own and the authors', into patched and unpatched models."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import variator_kernels as vk
from tests.checkpoint.cases import (
    first_format,
    same,
)
from tests.sites import tiny
from variator_kernels import checkpoint


def test_round_trip(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["plugins.json", "plugins.safetensors"]
    patched = vk.patch(tiny.model(), ratio=4, ratios=(2, 4), bottleneck=6)
    vk.load_plugins(patched, folder)
    assert patched.encoder.variator_state.ratio == 4
    assert same(patched, tiny.patched())
    plain = tiny.model()
    vk.load_plugins(plain, folder / "plugins.safetensors")
    assert plain.encoder.variator_state.ratio == 2
    assert plain.encoder.variator_state.ratios == (2, 4)
    assert same(plain, tiny.patched())
    vk.save_plugins(plain, folder)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("family", tiny.BERTS)
def test_round_trip_of_a_bert(family, tmp_path):
    model = tiny.patched(family, "gelu", head="ForSequenceClassification")
    vk.save_plugins(model, tmp_path)
    plain = tiny.model(family, "gelu", head="ForSequenceClassification")
    vk.load_plugins(plain, tmp_path)
    assert same(plain, model)
    vk.load_plugins(tiny.model(family, "gelu", head="ForMaskedLM"), tmp_path)
    with pytest.raises(ValueError, match=f"has family '{family}', the model has 't5'"):
        vk.load_plugins(tiny.model(), tmp_path)


def test_settings_say_what_they_are_for(folder):
    settings = json.loads((folder / "plugins.json").read_text())
    assert settings.pop("base")
    assert settings == {
        "format": 2,
        "method": "variator",
        "written_by": vk.__version__,
        "family": "t5",
        "hidden_size": 24,
        "layers": 2,
        "bottleneck": 6,
        "activation": "tanh",
        "placements": {"ffn": [2, 4]},
        "level": {"ffn": [2, 2]},
        "keep_first": 0,
        "keep_last": 0,
        "keep": [],
        "window": 64,
        "untrained": {},
    }


def test_takes_the_modules_dtype(folder):
    model = vk.patch(tiny.model().to(torch.bfloat16), ratios=(2, 4), bottleneck=6)
    vk.load_plugins(model, folder)
    for got, saved in zip(
        vk.plugin_parameters(model), vk.plugin_parameters(tiny.patched()), strict=True
    ):
        assert got.requires_grad
        assert torch.equal(got, saved.bfloat16())


def test_other_ratios_of_the_model_stay(folder):
    model = tiny.patched(ratios=(2, 4, 8))
    before = {k: p.clone() for k, p in model.named_parameters() if ".plugins." in k}
    with torch.no_grad():
        for parameter in vk.plugin_parameters(model):
            parameter.add_(1)
    vk.load_plugins(model, folder)
    for key, parameter in model.named_parameters():
        if ".plugins.8." in key:
            assert torch.equal(parameter, before[key] + 1)
    assert same(model, tiny.patched())


def test_an_interrupted_save_keeps_the_old_files(folder, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        vk.save_plugins(tiny.patched(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_loaded_plugins_are_looked_at_again(folder):
    model = vk.patch(tiny.model(), ratios=(2, 4), bottleneck=6)
    ids, mask = tiny.batch(9)
    with pytest.warns(UserWarning, match="untrained"):
        tiny.encode(model, ids, mask)
    vk.load_plugins(model, folder)
    assert not model.encoder.variator_state.warned


def test_reads_the_first_format(folder):
    first_format(folder)
    plain = tiny.model()
    vk.load_plugins(plain, folder)
    assert plain.encoder.variator_state.ratio == 2
    assert same(plain, tiny.patched())


SHARDED = """
    import sys, torch
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    import variator_kernels as vk
    from tests.sites import tiny

    init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
    model = tiny.patched(head="EncoderModel", ratios=(4,))
    before = [p.clone() for p in vk.plugin_parameters(model)]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    ids, mask = tiny.batch(9, 4)
    forward = torch.no_grad()(model)
    forward(ids, attention_mask=mask)
    assert vk.plugin_parameters(model)[0].dtype == torch.bfloat16, "a copy is in its place"
    vk.save_plugins(model, sys.argv[1])
    for parameter in vk.plugin_parameters(model):
        parameter.data.zero_()
    forward(ids, attention_mask=mask)
    vk.load_plugins(model, sys.argv[1])
    after = [p.full_tensor() for p in vk.plugin_parameters(model)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    destroy_process_group()
"""


def test_shards_are_saved_and_filled_not_their_copies(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SHARDED), str(tmp_path)]
    root = Path(__file__).parents[2]
    subprocess.run(command, cwd=root, check=True, timeout=120)
