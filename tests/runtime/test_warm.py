"""vk.warm: later calls are no first ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels import extension
from variator_kernels.freezing import _weights
from variator_kernels.ops.packed import cache
from variator_kernels.runtime.state import states

LEVELS = (1, 2, {"ffn": {-1: 4}})


@pytest.fixture
def model():
    return tiny.patched("bert")


def compiled_with(model):
    """The model compiled, and a list of its graphs."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    made = torch.compile(model, backend=backend)
    return made, compiled


@pytest.mark.skipif(extension.load() is None, reason="the kernels are not built")
def test_packs_ahead():
    # Frozen: weights so small may share pages with what is written, and are then not packed.
    model = vk.freeze(tiny.patched("bert", d_model=64, d_ff=256, num_heads=4))
    before = cache.nbytes(_weights(model))
    assert vk.warm(model, LEVELS, (16, 9), batches=(1, 8)) is model
    warmed = cache.nbytes(_weights(model))
    assert before == 0 < warmed
    for level in LEVELS:
        for rows, length in ((3, 11), (8, 16), (1, 9)):
            ids, mask = tiny.batch(*[length] * rows)
            with vk.use_ratio(model, level), torch.no_grad():
                model(input_ids=ids, attention_mask=mask)
    assert cache.nbytes(_weights(model)) == warmed


def test_one_graph_a_level():
    model = tiny.patched("bert", num_layers=1)
    made, compiled = compiled_with(model)
    with torch.no_grad():
        vk.warm(made, LEVELS, (16, 8), batches=(4, 2))
    assert len(compiled) == len(LEVELS)
    for level in LEVELS:
        for rows, length in ((3, 11), (5, 13), (2, 9)):
            ids, mask = tiny.batch(*[length] * rows)
            with torch.no_grad(), vk.use_ratio(made, level):
                got = made(input_ids=ids, attention_mask=mask).last_hidden_state
            with torch.no_grad(), vk.use_ratio(model, level):
                wanted = model(input_ids=ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(got, wanted)
    assert len(compiled) == len(LEVELS)
    torch._dynamo.reset()


def test_more_levels_than_graphs():
    model = tiny.patched("bert")
    made, compiled = compiled_with(model)
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.raises(ValueError, match=r"levels must be at most .*recompile_limit, 2, .* got 3"),
    ):
        vk.warm(made, LEVELS, (8,))
    assert not compiled


def test_leaves_the_level(model):
    vk.set_ratio(model, 4)
    vk.warm(model, (1, 2), (5,))
    assert states(model)[0].ratio == 4


def test_an_encoder_decoder_and_inputs_of_ones_own():
    vk.warm(tiny.patched("t5"), (1, 4), (6,), batches=(2,))
    seen = []

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny.patched("bert")

        def forward(self, ids):
            seen.append(tuple(ids.shape))
            return self.inner(input_ids=ids).last_hidden_state.mean(1)

    model = Pooled().eval()
    with pytest.raises(ValueError, match="inputs must be given"):
        vk.warm(model, (1,), (3,))
    vk.warm(model, (1, 2), (3, 5), inputs=lambda b, n: {"ids": torch.ones(b, n).long()})
    assert seen == [(1, 5)] * 2 + [(1, 3)] * 2 + [(1, 5)] * 2 + [(1, 3)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": ()}, "must each name at least one"),
        ({"lengths": ()}, "must each name at least one"),
        ({"lengths": (0,)}, "lengths must be >= 1, got 0"),
        ({"batches": (1.5,)}, "batches must be an integer >= 1, got 1.5"),
        ({"levels": (1, 3)}, "ratio must be 1"),
    ],
)
def test_refuses(model, change, message):
    with pytest.raises(ValueError, match=message):
        vk.warm(model, **{"levels": (1,), "lengths": (4,)} | change)


def test_refuses_training(model):
    with pytest.raises(ValueError, match="evaluation mode"):
        vk.warm(model.train(), (1,), (4,))
