"""Attention among merged vectors, as the sublayer that a plugin of ``attention`` goes around."""

from __future__ import annotations

from torch import Tensor

from ....ops.feed_forward import FeedForward
from ....ops.groups import Groups
from ....ops.self_attention import SelfAttention, Terms, around, members, merged_queries
from ....sites.reach import Reach


class AroundAttention:
    """One sublayer, for some rows at a time: who attends to whom depends on their groups."""

    def __init__(self, attention: SelfAttention, reach: Reach, backend: str) -> None:
        self.attention, self.reach, self.backend = attention, reach, backend

    def __call__(self, x: Tensor, groups: Groups, positions: Tensor | None) -> FeedForward:
        tokens = members(groups, x)
        keys = merged_queries(tokens, x, frozen_terms(self.reach, self.attention, x))
        turned = None
        if self.reach.rotary is not None:
            assert positions is not None
            turned = self.reach.rotation(x, tokens.mean(positions))
        rotations = None if turned is None else (turned, turned)
        return around(self.attention, keys, rotations, self.backend)


def frozen_terms(reach: Reach, attention: SelfAttention, x: Tensor) -> Terms:
    """What is added to scores, without a gradient: none is wanted, and the kernels know none.

    Raises:
        ValueError: it depends on places that only the encoder gets.
    """
    if reach.paths.places:
        raise ValueError(
            "calibrate must be of placements ('ffn',) where attention has terms of places that "
            f"{reach.paths.carrier_class} gets ({', '.join(reach.paths.carried)}): they are not "
            "kept beside hidden states; train those plugins instead"
        )
    return reach.terms(x, attention, {}).detached()
