"""How long packed weights are kept, what they keep alive, and frozen ones."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from tests.ops.packed_cases import COLUMNS, ROWS, marks, product, same
from variator_kernels.ops import prepack
from variator_kernels.ops.packed import PackCache, cache

pytestmark = marks


def test_nothing_is_packed_twice_without_a_write():
    weight = torch.randn(ROWS, COLUMNS)
    before = prepack.linear(weight, None).weight
    neighbours = [torch.randn(n) for n in range(1, 400)]  # writes around it
    assert len(neighbours) and prepack.linear(weight, None).weight is before
    weight.numpy()[0, 0] = weight.numpy()[0, 0]
    assert prepack.linear(weight, None).weight is before


def test_no_packed_form_keeps_its_source_alive():
    weight, bias = torch.randn(ROWS, COLUMNS), torch.randn(ROWS)
    prepack.linear(weight, bias)
    prepack.transposed(weight, torch.float32)
    died = [weakref.ref(t.untyped_storage()) for t in (weight, bias)]
    assert cache.nbytes([weight, bias]) >= 2 * weight.nbytes
    del weight, bias
    gc.collect()
    assert all(ref() is None for ref in died)


def test_a_storage_that_is_resized_leaves_nothing_behind():
    weight = torch.randn(ROWS, COLUMNS)
    storage, entries = weight.untyped_storage(), len(cache._entries.all)
    for _ in range(5):
        values, size = weight.clone(), storage.nbytes()
        assert same(weight)
        storage.resize_(0)
        blocker = torch.empty(ROWS, COLUMNS)
        storage.resize_(size)
        weight.copy_(values)
        del blocker
    assert same(weight) and len(cache._entries.all) <= entries + 1


def test_parts_of_one_storage_with_others_stay():
    """A gate and its product in one matrix, each with its own bias."""
    both, made = torch.randn(4, 3), []
    pairs = [(both[:2], torch.randn(2)), (both[2:], torch.randn(2))]
    for _ in range(2):
        for pair in pairs:
            cache.get(pair, "parts", lambda *copies: made.append(copies))
    assert len(made) == 2


def test_parameters_can_be_swapped():
    layer = nn.Linear(COLUMNS, ROWS)
    prepack.linear(layer.weight, layer.bias)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
        layer.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert same(layer.weight)


def test_frozen_weights(rule):
    weight = torch.randn(ROWS, COLUMNS)
    cache.freeze([weight])
    assert same(weight) and cache.rules([weight]) == {"frozen": weight.nbytes}
    before = prepack.linear(weight, None).weight
    weight.numpy()[4] = 1.0  # against the promise
    assert prepack.linear(weight, None).weight is before
    cache.thaw([weight])
    assert same(weight) and cache.rules([weight]) == {rule: weight.nbytes}


def test_a_frozen_weight_that_pytorch_writes_to():
    weight = torch.randn(ROWS, COLUMNS)
    cache.freeze([weight])
    product(weight)
    weight[3].add_(1)
    with pytest.raises(RuntimeError, match=r"\(160, 176\).*vk.thaw\(model\)"):
        product(weight)
    cache.thaw([weight])
    assert same(weight)


def test_freezing_ends_with_the_memory():
    weight = torch.randn(ROWS, COLUMNS)
    cache.freeze([weight])
    del weight
    gc.collect()
    assert not cache._frozen


def test_few_rows_are_not_worth_reading_a_weight(rule):
    weight = torch.randn(ROWS, COLUMNS)
    packs = prepack.linear(weight, None, rows=4) is not None
    assert packs == (rule == "tracked")
    assert prepack.linear(weight, None, rows=512) is not None
    assert (prepack.linear(weight, None, rows=4) is not None) == packs
    cache.freeze([weight])
    assert prepack.linear(weight, None, rows=4) is not None


def test_written_while_it_is_packed():
    """What is made meanwhile is of neither state, and serves nobody else."""
    weight, packs = torch.zeros(ROWS, COLUMNS), PackCache(cache.track)

    def make(copy):
        if not weight.any():
            weight.numpy()[60] = 1.0
        return copy

    assert not packs.get((weight,), "copy", make).any()
    assert packs.get((weight,), "copy", make).any()


def test_forms_of_several_sources_that_share_some_stay():
    """Sources of other storages are none of those that moved."""
    cache, made = PackCache(), []
    a, b, c = (torch.randn(200, 200) for _ in range(3))

    def make(*copies):
        made.append(len(copies))
        return copies[0]

    for _ in range(3):
        for sources in ((a, b, c), (b, c), (c,)):
            cache.get(sources, "form", make)
    assert made == [3, 2, 1]


def test_few_numbers_beside_a_weight_are_known_by_their_values():
    """Wherever they lie; what they are counts."""
    weight, made = torch.randn(ROWS, COLUMNS), []

    def get(bias):
        return cache.get(
            (weight, bias), "both", lambda *copies: made.append(1) or copies[1].clone()
        )

    first = torch.tensor([1.0, torch.nan, -0.0, 3.0])
    for _ in range(3):
        assert torch.equal(get(first.clone())[:1], first[:1])
    assert len(made) == 1
    first[3] = 4.0
    assert get(first)[3] == 4 and len(made) == 2
    first.numpy()[3] = 5.0
    assert get(first)[3] == 5 and get(first.clone())[3] == 5 and len(made) == 3
    assert get(first.double()).dtype == torch.float64 and len(made) == 4
    entries = len(cache._entries.all)
    for value in range(20):
        get(torch.full((4,), float(value)))
    assert len(cache._entries.all) == entries  # nothing piles up
    alone = torch.randn(4)
    assert cache.get((alone,), "alone", lambda copy: copy.clone()) is not None
    alone[0] = 7.0
    assert cache.get((alone,), "alone", lambda copy: copy.clone())[0] == 7


def test_few_numbers_that_are_written_while_something_is_made_of_them():
    """By what reads the source itself, not its copy."""
    weight, bias = torch.randn(ROWS, COLUMNS), torch.zeros(4)

    def make(_, copy):
        bias.fill_(2.0)
        return bias.clone()

    assert cache.get((weight, bias), "late", make)[0] == 2
    bias.zero_()
    assert cache.get((weight, bias), "late", lambda _, copy: copy.clone())[0] == 0
