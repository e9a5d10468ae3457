"""The states of a model are found again fast, and never those of before."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.runtime import find_states
from variator_kernels.runtime.find_states import found
from variator_kernels.runtime.state import states


@pytest.fixture
def walks(monkeypatch):
    """How often a model was walked through."""
    counted = []

    def walk(model):
        counted.append(model)
        return states(model)

    monkeypatch.setattr(find_states, "states", walk)
    return counted


def test_a_switch_walks_once(walks):
    model = tiny.patched()
    for ratio in (1, 2, 4):
        vk.set_ratio(model, ratio)
        with vk.use_ratio(model, 2):
            pass
    assert len(walks) == 1
    assert found(model) == states(model)


def test_a_patched_model_that_is_added_is_found():
    both = nn.ModuleDict({"first": tiny.patched()})
    vk.set_ratio(both, 2)
    both["second"] = tiny.patched()
    vk.set_ratio(both, 4)
    assert [state.ratio for state in states(both)] == [4, 4]


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda modules: nn.Sequential(*modules)])
def test_a_patched_model_that_is_inserted_is_found(kind, walks):
    """``insert`` registers nothing; the number of modules may be the one of before."""
    first, second, third = (tiny.patched() for _ in range(3))
    some = kind([first, nn.Identity()])
    vk.set_ratio(some, 2)
    del some[1]
    some.insert(1, second)
    vk.set_ratio(some, 4)
    some.insert(0, third)
    with vk.use_ratio(some, 2):
        assert [state.current().uniform for state in states(some)] == [2, 2, 2]
    vk.set_ratio(some, 2)
    assert len(walks) == 3
    assert [states(model)[0].ratio for model in (first, second, third)] == [2, 2, 2]


def test_a_model_that_is_patched_later_is_found():
    both = nn.ModuleDict({"first": tiny.patched(), "second": tiny.model()})
    vk.set_ratio(both, 2)
    vk.patch(both["second"], 2, (2, 4))
    vk.set_ratio(both, 4)
    assert [state.ratio for state in states(both)] == [4, 4]


def test_a_model_that_took_anothers_place_is_found():
    holder = nn.ModuleDict({"model": tiny.patched()})
    old = holder["model"]
    vk.set_ratio(holder, 2)
    new = tiny.patched()
    holder._modules["model"] = new  # as some libraries do, past __setattr__
    vk.set_ratio(holder, 4)
    assert states(new)[0].ratio == 4 and states(old)[0].ratio == 2
    del holder["model"]
    with pytest.raises(ValueError, match="not patched"):
        vk.set_ratio(holder, 2)


def test_an_unpatched_model_is_none():
    model = tiny.patched()
    vk.set_ratio(model, 2)
    vk.unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        vk.set_ratio(model, 2)
    vk.patch(model, 2, (2, 8))
    vk.set_ratio(model, 8)
    assert states(model)[0].ratio == 8


def test_a_copy_has_states_of_its_own():
    model = tiny.patched()
    vk.set_ratio(model, 2)
    other = copy.deepcopy(model)
    vk.set_ratio(other, 4)
    assert (states(model)[0].ratio, states(other)[0].ratio) == (2, 4)


def test_keeps_nothing_alive():
    model = tiny.patched()
    vk.set_ratio(model, 2)
    gone = weakref.ref(model), weakref.ref(states(model)[0])
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        found(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not patched"):
        found(torch.nn.Linear(2, 2))


def test_plans_are_told_apart():
    """Levels are kept by plans' identities, and a plan that is gone leaves its to no other."""
    model = tiny.patched()
    sites = states(model)[0].sites
    numbers = {"limit": 1.0, "predicted_cost": 1.0, "cost": 1.0, "loss": 0.0}
    for turn in range(200):
        ratios = ((1, 2), (2, 4), (4, 1))[turn % 3]
        vk.set_ratio(model, vk.Plan(sites, ratios, "cost", measure="flops", **numbers))
        assert states(model)[0].level.ratios == ratios
    with pytest.raises(ValueError, match="ratio must be"):
        vk.set_ratio(model, True)
    with pytest.raises(ValueError, match="ratio must be"):
        vk.set_ratio(model, 3)


def test_lists_that_a_forward_makes_walk_nowhere(walks):
    model = tiny.patched()
    vk.set_ratio(model, 1)
    nn.ModuleList(list(model.encoder.block)[:1])  # as transformers does in decoders
    vk.set_ratio(model, 2)
    assert len(walks) == 1
    model.encoder.block[0] = model.encoder.block[1]
    vk.set_ratio(model, 4)
    assert len(walks) == 2
