"""Models before and after loading, and folders of plugins that somebody edited."""

import json

import torch
from safetensors.torch import load_file, save_file

import variator_kernels as vk
from tests.sites import tiny


def same(a, b):
    ids, mask = tiny.batch(9, 4)
    return all(
        torch.equal(tiny.encode(a, ids, mask), tiny.encode(b, ids, mask))
        for k in (2, 4)
        if vk.set_ratio(a, k) is None and vk.set_ratio(b, k) is None
    )


def values(model):
    return [p.clone() for p in vk.plugin_parameters(model)]


def unchanged(model, before):
    return all(torch.equal(a, b) for a, b in zip(before, vk.plugin_parameters(model), strict=True))


def first_format(folder):
    """The folder as version 0.1.0 wrote it."""
    tensors = load_file(folder / "plugins.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        _, layer, ratio, field = name.split(".", 3)
        renamed[f"layer.{layer}.ratio.{ratio}.{field}"] = tensor
    settings = {"format": 1, "family": "t5", "ratios": [2, 4], "ratio": 2, "bottleneck": 6}
    settings |= {"activation": "tanh", "hidden_size": 24, "layers": 2}
    text = json.dumps(settings, indent=2) + "\n"
    save_file(renamed, folder / "plugins.safetensors", {"settings": text})
    (folder / "plugins.json").write_text(text)


def edit_settings(**changes):
    def edit(folder):
        tensors = load_file(folder / "plugins.safetensors")
        settings = json.loads((folder / "plugins.json").read_text()) | changes
        text = json.dumps(settings)
        save_file(tensors, folder / "plugins.safetensors", {"settings": text})
        (folder / "plugins.json").write_text(text)

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "plugins.safetensors")
        change(tensors)
        text = (folder / "plugins.json").read_text()
        save_file(tensors, folder / "plugins.safetensors", {"settings": text})

    return edit


def edit_text(old, new):
    def edit(folder):
        tensors = load_file(folder / "plugins.safetensors")
        before = (folder / "plugins.json").read_text()
        text = before.replace(old, new, 1)
        assert text != before
        save_file(tensors, folder / "plugins.safetensors", {"settings": text})
        (folder / "plugins.json").write_text(text)

    return edit
