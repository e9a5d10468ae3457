"""Which tokens the first sublayer of a patched model left whole."""

import torch

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.runtime.state import observe


def state_of(model):
    return tiny.encoder(model).variator_state


def first_inputs(model, *args, **settings):
    """What layer 0's sublayer takes in a forward, and what it gives."""
    seen = []
    layer = tiny.layers(model)[0]
    watch = observe(state_of(model), lambda at, x, mask, k: seen.append(x) if at is layer else None)
    outputs = []
    original = state_of(model).method.feed_forward

    def record(at, *given):
        out = original(at, *given)
        if at is layer:
            outputs.append(out)
        return out

    state_of(model).method.feed_forward = record
    try:
        with watch, torch.no_grad():
            tiny.encode(model, *args, **settings)
    finally:
        del state_of(model).method.feed_forward
    return seen[0], outputs[0]


def whole(model, x, out):
    """bool ``[B, n]``: where the sublayer gave its dense value."""
    state = state_of(model)
    with vk.use_ratio(model, 1), torch.no_grad():
        state.local.context = None
        dense = tiny.run(tiny.layers(model)[0], x)
    return (out - dense).abs().amax(-1) < 1e-5  # T5 norms in fp32
