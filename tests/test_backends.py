"""Which backend is chosen, and that a kernel which never ran on a GPU is not."""

from __future__ import annotations

import types

import pytest
import torch

from variator_kernels import backends


def status_of(name):
    return next(status for status in backends.status() if status.name == name)


def on_a_gpu(monkeypatch, arch=(9, 0)):
    """As on a machine with one; returns something that claims to be a tensor there."""
    monkeypatch.setattr(backends, "_INTERPRETER", False)
    monkeypatch.setattr(backends, "_WHY_NO_TRITON", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    properties = types.SimpleNamespace(major=arch[0], minor=arch[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)


def test_auto_does_not_pick_what_never_ran(monkeypatch):
    x = on_a_gpu(monkeypatch)
    monkeypatch.setattr(backends, "_PROVEN", {"triton": []})
    assert backends.resolve("auto", x) == "reference"
    assert backends.resolve("triton", x) == "triton"
    assert status_of("triton").usable
    assert "never run on a GPU: 'auto' does not pick it" in status_of("triton").detail


def test_auto_picks_what_ran_on_that_architecture(monkeypatch):
    x = on_a_gpu(monkeypatch)
    monkeypatch.setattr(backends, "_PROVEN", {"triton": [{"arch": "sm_90"}]})
    assert backends.resolve("auto", x) == "triton"
    assert "'auto' picks it there" in status_of("triton").detail
    x.dtype = torch.float64
    assert backends.resolve("auto", x) == "reference"
    assert backends.resolve("auto", on_a_gpu(monkeypatch, (8, 0))) == "reference"


def test_an_explicit_choice_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(backends, "_INTERPRETER", False)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .* expected cuda"):
        backends.resolve("triton", torch.zeros(1))
    x = on_a_gpu(monkeypatch)
    why = backends._why_no_triton("3.2.0+rocm")
    monkeypatch.setattr(backends, "_WHY_NO_TRITON", why)
    with pytest.raises(ValueError, match=r"3.2.0\+rocm is installed, 3.6 or newer is needed"):
        backends.resolve("triton", x)
    assert not status_of("triton").usable
    with pytest.raises(ValueError, match=r"'cpu' cannot run here: .* expected cpu"):
        backends.resolve("cpu", x)


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0.1+git12ab"])
def test_versions_of_triton_that_will_do(version):
    assert backends._why_no_triton(version) is None


@pytest.mark.parametrize("version", [None, "2.2.0", "3.5.1", "unknown"])
def test_versions_of_triton_that_will_not_do(version):
    assert "3.6 or newer is needed" in backends._why_no_triton(version)


def test_the_record_of_proofs_is_whole():
    for backend, rows in backends._PROVEN.items():
        assert backend in backends.BACKENDS
        for row in rows:
            assert {"arch", "gpu", "torch", "triton", "commit"} <= row.keys()
