"""Plugins from the hub, whose client is replaced: there may be no network."""

import huggingface_hub
import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    trained = tiny.patched()
    vk.save_plugins(trained, tmp_path / "cache")
    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = tiny.model()
    vk.load_plugins(model, "owner/my-plugins")
    pairs = zip(vk.plugin_parameters(model), vk.plugin_parameters(trained), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    repo, patterns = asked[-1]
    assert repo == "owner/my-plugins" and "plugins.safetensors" in patterns


def test_what_is_here_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vk.save_plugins(tiny.patched(), tmp_path / "owner" / "name")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    vk.load_plugins(tiny.model(), "owner/name")


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("no such repository")])
def test_without_an_answer_nothing_changes(error, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    model = tiny.model()
    before = tiny.snapshot(model)
    with pytest.raises(FileNotFoundError, match=f"no folder 'owner/name' here.*{error}"):
        vk.load_plugins(model, "owner/name")
    assert tiny.snapshot(model) == before


def test_paths_are_no_ids(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    for source in ("absent", "./owner/name", "/absent/name", "a/b/c"):
        with pytest.raises(FileNotFoundError):
            vk.load_plugins(tiny.model(), source)
