"""The context of a forward: its mask, and groups made once."""

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.runtime.context import Context
from variator_kernels.runtime.level import Level

LEVEL = Level((2, 2))


def test_the_last_columns_of_a_longer_mask_are_the_tokens():
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1, 1]]) != 0
    context = Context(mask, LEVEL)
    assert torch.equal(context.mask_of(x), mask[:, 2:])
    assert context.groups(x, 2, "reference") is context.groups(x, 2, "reference")
    assert context.groups(x, 4, "reference") is not context.groups(x, 2, "reference")
    assert Context(None, LEVEL).mask_of(x) is None


@pytest.mark.parametrize("size", [(2, 4), (3, 5), (1, 7)])
def test_refuses_a_mask_of_other_tokens(size):
    context = Context(torch.ones(size, dtype=torch.bool), LEVEL)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, 5\] \(or more"):
        context.groups(torch.randn(2, 5, 8), 2, "reference")


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_a_prefix_of_keys_changes_no_group(family):
    """As with prefix tuning: the mask speaks of more keys than there are hidden states."""
    model = tiny.patched(family, "gelu")
    ids, mask = tiny.batch(9, 4)
    layer = tiny.layers(model)[0]
    x = torch.randn(2, 9, 24)
    local = tiny.encoder(model).variator_state.local
    outputs = []
    for given in (mask, torch.cat([torch.ones(2, 3, dtype=mask.dtype), mask], 1)):
        local.context = Context(given != 0, tiny.encoder(model).variator_state.current())
        outputs.append(tiny.run(layer, x))
    local.context = None
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], tiny.run(layer, x))  # without a mask
    with vk.use_ratio(model, 1), torch.no_grad():
        tiny.encode(model, ids, mask)
