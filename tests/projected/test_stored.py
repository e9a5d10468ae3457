"""Checkpoints of projected models fit the original that they were made from, and no other."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from tests.projected import cases
from variator_kernels.methods.projected import stored


@pytest.fixture
def saved(tmp_path):
    model = cases.model("llama").float()
    small = cases.project(model)
    stored.save(small, tmp_path)
    return model, small, tmp_path


def test_rebuilt_of_its_original_in_any_dtype(saved):
    model, small, folder = saved
    inputs = cases.batch(model)
    rebuilt = stored.rebuild(model, folder)
    assert torch.equal(cases.output(rebuilt, inputs), cases.output(small, inputs))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        other = copy.deepcopy(model).to(dtype)
        stored.save(stored.rebuild(other, folder), folder / "again")
        stored.load(small, folder / "again")


def test_another_original_is_refused(saved):
    model, _, folder = saved
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + 1e-5)
    match = r"the original must be the model that .* was projected from: .*\.weight has values"
    with pytest.raises(ValueError, match=match):
        stored.rebuild(tuned, folder)
    other = cases.project(tuned)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match=match):
        stored.load(other, folder)
    assert all(map(torch.equal, before, other.parameters()))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ValueError, match=match):
        stored.rebuild(tuned.bfloat16(), folder)


def test_files_without_values_still_load(saved):
    model, small, folder = saved
    path = folder / stored.SETTINGS
    settings = json.loads(path.read_text())
    assert settings.pop("frozen")
    path.write_text(json.dumps(settings))
    inputs = cases.batch(model)
    expected = cases.output(small, inputs)
    assert torch.equal(cases.output(stored.rebuild(model, folder), inputs), expected)
