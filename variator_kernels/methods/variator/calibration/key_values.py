"""The merge in front of one attention's keys and values, fitted to what the dense model has there.

In closed form: if all queries saw a group's tokens in the same proportions, a merge in these
proportions would give the dense output. So the scores are the least-squares fit, on the hidden
vectors, of the logarithm of the attention that a token receives. Used if they serve better than a
mean; then gradient descent through the sublayer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ....ops.arguments import MergeWeights
from ....ops.feed_forward import normalize
from ....ops.grouped_attention.reference import looked_up
from ....ops.groups import Groups
from ....ops.self_attention import (
    Pairs,
    SelfAttention,
    attention_kv,
    by_content,
    keys_and_values,
    members,
    plain_keys,
    queries,
    whole_queries,
    with_global_keys,
)
from ....sites.reach import Reach
from .around_attention import frozen_terms
from .descent import Behind, minimise, weighted
from .fit import MILD, SHARPNESS, set_merge
from .inputs import merged_tokens
from .regression import Moments, regression

ROWS = 16
"""Of a chunk at a time: their attention weights exist as a whole."""


class KeyValues:
    """One sublayer. ``positions``: None, or the rows' position ids ``[B, n]``, for RoPE."""

    def __init__(self, attention: SelfAttention, reach: Reach, backend: str) -> None:
        self.attention, self.reach, self.backend = attention, reach, backend

    def run(self, x: Tensor, merge: MergeWeights, groups: Groups, positions: Tensor) -> Tensor:
        """The sublayer with merged keys and values: ``x [B, n, d]``."""
        tokens = members(groups, x)
        keys = whole_queries(tokens, x, frozen_terms(self.reach, self.attention, x))
        turned = None
        if self.reach.rotary is not None:
            merged = self.reach.rotation(x, tokens.mean(positions))
            turned = self.reach.rotation(x, positions), merged
        return attention_kv(x, merge, self.attention, groups, keys, turned, self.backend)

    def behind(
        self,
        x: Tensor,
        dense: Tensor,
        mask: Tensor,
        groups: Groups,
        weights: Tensor | None,
        positions: Tensor,
    ) -> Behind:
        """What there is to fit; ``weights [B, n]`` of each token, None: one over its variance."""
        weight = mask.float()
        if weights is not None:
            weight = weight * weights
        elif not self.attention.post_norm:
            square = dense.float().square().mean(-1)
            weight = weight / square.clamp_min(1e-3 * float(square[mask].mean()) + 1e-30)
        return Behind(x, dense.float(), weight, groups, positions.expand(mask.shape))

    def hidden(self, x: Tensor) -> Tensor:
        """What the products see of ``x [B, n, d]``."""
        norm = self.attention.pre_norm
        return normalize(x, norm.name, norm.weight, norm.bias, norm.eps)

    def scores(self, parts: Sequence[tuple[Tensor, Tensor, Groups, Tensor, bool]]) -> Tensor:
        """``[d]``: the linear map of h that fits the logarithm of the attention that it receives.

        ``parts``: x, mask, groups, positions of a chunk, and whether it is held out.
        """
        both: tuple[Moments, Moments] | None = None
        for x, mask, groups, positions, held_out in parts:
            h = self.hidden(x)
            positions = positions.expand(mask.shape)
            seen = torch.cat(
                [
                    self._received(h[i : i + ROWS], mask[i : i + ROWS], positions[i : i + ROWS])
                    for i in range(0, len(h), ROWS)
                ]
            )
            used = merged_tokens(x, groups)[1]
            z = h.flatten(0, 1)[used].float()
            t = seen.flatten()[used][:, None].clamp_min(1e-12).log()
            if not len(z):
                continue
            if both is None:
                both = Moments(z.mean(0), t.mean(0)), Moments(z.mean(0), t.mean(0))
            both[held_out].add(z, t, torch.ones_like(t))
        if both is None or not all(part.total for part in both):
            return torch.zeros(parts[0][0].shape[-1])
        return regression(*both, MILD).weight[0]

    def _received(self, h: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """The dense weights of each token as a key, ``[B, n]``: sums over queries and heads."""
        attention, n = self.attention, h.shape[1]
        terms = frozen_terms(self.reach, attention, h)
        if terms.blocks is None:  # keys of all rows add the same
            keys = plain_keys(h[:1], None, terms)
        else:
            keys = plain_keys(h, mask, terms)
        source = with_global_keys(h, h, keys.sums, attention.global_keys)
        q, k = queries(h, attention), keys_and_values(source, attention)[0]
        if self.reach.rotary is not None:
            turned = self.reach.rotation(h, positions)
            q, k = turned.of(q), turned.of(k)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = q.transpose(1, 2).float() @ k.permute(0, 2, 3, 1).float() * attention.scale
        if keys.relative is not None:
            scores = scores + looked_up(keys.relative).float()
        if isinstance(keys.pairs, Pairs):
            content = by_content(q, k, keys.pairs.terms.distances, attention)
            scores = scores + keys.pairs.block(0, n, content).float()
        there = mask if keys.bias is None else keys.bias != -torch.inf
        scores = scores.masked_fill(~there[:, None, None], -torch.inf)
        seen = torch.where(mask[:, None, :, None], scores.softmax(-1).nan_to_num(), 0)
        return seen.sum((1, 2))[:, :n]


def fit(
    plugin: Any,
    site: KeyValues,
    sample: Sequence[tuple[Tensor, Tensor, Groups, Tensor, bool]],
    chunks: Sequence[Callable[[], Behind]],
    root: Tensor | None,
    passes: int,
) -> None:
    """Gives ``plugin`` its values.

    ``chunks`` make what is fitted to; ``root [d, d]``: errors count as
    ``e @ root``.
    """
    scores = site.scores(sample).to(plugin.merge.weight.device)

    def loss(rows: Behind, found: Sequence[Tensor]) -> Tensor:
        assert rows.positions is not None
        y = site.run(rows.x, MergeWeights(*found), rows.groups, rows.positions).float()
        return weighted(y, rows, root)

    errors = []
    for sharpness in SHARPNESS:
        set_merge(plugin.merge, sharpness * scores)
        weights = plugin.merge.weight, plugin.merge.bias
        errors.append((sum(float(loss(chunk(), weights)) for chunk in chunks[:4]), sharpness))
    set_merge(plugin.merge, min(errors)[1] * scores)
    if passes:
        spread = torch.cat([site.hidden(x)[mask].float() for x, mask, *_ in sample])
        spread = spread.std(0, correction=0)
        spread = spread.clamp_min(1e-3 * float(spread.mean()) + 1e-30)
        one = spread.new_ones(())
        scales = [1 / spread.repeat(plugin.merge.ratio), one]
        minimise([plugin.merge.weight, plugin.merge.bias], scales, loss, chunks, passes)
