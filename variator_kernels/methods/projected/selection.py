"""The start ``"select"``: projections that pick dimensions, and so the hard-pruned model."""

from __future__ import annotations

import torch
from torch import Tensor

from .assemble import Builder, Factors
from .constants import Constants
from .importance import Importance
from .sizes import Sizes


def picks(kept: Tensor, size: int) -> Tensor:
    """``[size, len(kept)]`` in float64: column j has a one at ``kept[j]``."""
    return torch.eye(size, dtype=torch.float64, device=kept.device)[:, kept]


def select(
    builder: Builder, scores: Importance | None, sizes: Sizes, own: Sizes, fold: Constants
) -> None:
    """Fill ``builder``. ``scores`` may be None where nothing gets smaller. ``fold``: by how much
    more the original multiplies than the small model."""
    layout = builder.layout
    kept = stream = None
    if layout.residual is not None and sizes.hidden < own.hidden:
        assert scores is not None
        kept = scores.kept_hidden(sizes.hidden)
        stream = picks(kept, own.hidden)
    for part in layout.sublayers:
        inner = None
        if part.inner and sizes.ffn < own.ffn:
            assert scores is not None
            inner = picks(scores.kept_ffn(part, sizes.ffn), own.ffn)
        ffn = None if inner is None else inner.mT
        for name in part.reads:
            builder.matrix(name, Factors(stream, ffn))
            builder.bias(name, ffn)
        for name in part.memory:
            builder.matrix(name, Factors(stream))
            builder.bias(name, None)
        back = None if stream is None else stream.mT
        builder.matrix(part.writes, Factors(inner, back))
        builder.bias(part.writes, back)
        if part.norm and layout.residual is not None:
            gain = builder.gain(part.norm)
            builder.set_gain(part.norm, gain if kept is None else gain[kept])
    if layout.residual is None:
        return
    factor = fold.embedding
    builder.matrix(layout.embeddings[0], Factors(None if stream is None else stream * factor))
    shared = layout.tied and not builder.untied
    if layout.head and not shared:
        builder.matrix(layout.head, Factors(stream))
    if layout.head:
        builder.bias(layout.head, None)
    for position, stack in enumerate(layout.stacks):
        gain = builder.gain(stack.norm)
        gain = gain if kept is None else gain[kept]
        if position == len(layout.stacks) - 1 and layout.head and kept is not None:
            gain = gain * fold.head / (factor if shared else 1.0)
        builder.set_gain(stack.norm, gain)
