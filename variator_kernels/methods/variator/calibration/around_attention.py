"""Attention among merged vectors, as the sublayer that a plugin of ``attention`` goes around."""

from __future__ import annotations

from torch import Tensor

from ....ops.feed_forward import FeedForward
from ....ops.groups import Groups
from ....ops.self_attention import SelfAttention, Table, around, members, merged_queries
from ....sites.attention import Reach


class AroundAttention:
    """One sublayer, for some rows at a time: who attends to whom depends on their groups."""

    def __init__(self, attention: SelfAttention, reach: Reach, backend: str) -> None:
        self.attention, self.reach, self.backend = attention, reach, backend

    def __call__(self, x: Tensor, groups: Groups, positions: Tensor | None) -> FeedForward:
        tokens = members(groups, x)
        keys = merged_queries(tokens, x, frozen_table(self.reach, x), self.attention.window)
        turned = None
        if self.reach.rotary is not None:
            assert positions is not None
            turned = self.reach.rotation(x, tokens.mean(positions))
        rotations = None if turned is None else (turned, turned)
        return around(self.attention, keys, rotations, self.backend)


def frozen_table(reach: Reach, x: Tensor) -> Table | None:
    """T5's table without a gradient: none is wanted, and the kernels know none."""
    table = reach.distances(x)
    return None if table is None else table._replace(weight=table.weight.detach())
