"""Training the plugins of several placements."""

import json

import pytest
import torch

from tests.train import toy
from variator_kernels.train.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def command(folder, *more):
    model = folder / "model"
    if not model.exists():
        toy.bert(model, spread=0.3)
        toy.plain_text(folder / "text.txt")
    main(
        [
            *("pretrain", "--model", str(model), "--data", str(folder / "text.txt")),
            *("--output", str(folder / "out"), "--bottleneck", "4", "--max-length", "16"),
            *("--max_steps", "3", "--per_device_train_batch_size", "4", "--use_cpu", "true"),
            *("--learning_rate", "0.01", "--warmup_steps", "0", "--disable_tqdm", "true"),
            *("--noise", "none", *more),
        ]
    )
    return folder / "out"


def plugins(folder):
    from safetensors.torch import load_file

    settings = json.loads((folder / "out" / "plugins.json").read_text())
    return settings, load_file(folder / "out" / "plugins.safetensors")


def test_several_placements_of_several_ratios(tmp_path):
    command(tmp_path, "--placements", "ffn,attention_kv", "--ratios", "2", "4")
    settings, tensors = plugins(tmp_path)
    assert settings["placements"] == {"ffn": [2, 4], "attention_kv": [2, 4]}
    for name, tensor in tensors.items():
        if name.endswith("merge.weight"):
            assert tensor.any(), name


def test_one_level(tmp_path):
    command(tmp_path, "--level", '{"ffn": {"-1": 4}, "attention_kv": 2}')
    settings, tensors = plugins(tmp_path)
    assert settings["placements"] == {"ffn": [4], "attention_kv": [2]}
    assert settings["level"] == {"ffn": [1, 4], "attention_kv": [2, 2]}
    moved = {name for name, tensor in tensors.items() if tensor.any() and "merge.weight" in name}
    assert moved == {
        f"{site}.merge.weight" for site in ("ffn.1.4", "attention_kv.0.2", "attention_kv.1.2")
    }


def test_goes_on_from_plugins_of_their_placements(tmp_path):
    first = command(tmp_path, "--placements", "attention", "--ratios", "4")
    before = plugins(tmp_path)[1]
    first.rename(tmp_path / "first")
    command(tmp_path, "--plugins", str(tmp_path / "first"))
    settings, after = plugins(tmp_path)
    assert settings["placements"] == {"attention": [4]}
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="level must not be given beside"):
        command(tmp_path, "--level", '{"ffn": 4}', "--ratios", "2")
    with pytest.raises(ValueError, match="placements must be among"):
        command(tmp_path, "--placements", "keys")
