"""One plugin, fitted to what the dense model has behind its site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....ops.feed_forward import FeedForward, normalize, products
from ....ops.group_merge.reference import group_merge
from ....ops.groups import Groups
from ....ops.prepacked_linear import linear
from .descent import Spread
from .inputs import merged_tokens
from .regression import Fit, Moments, reduced_rank, regression

SHARPNESS = (0.0, 1.0)
"""Factors tried on the merge's fitted scores; 0 is a mean."""
MILD = (0.1,)
"""The ridge where only the merge is decided."""
SCALE = 0.4
"""Standard deviation of what goes into tanh."""


class Part(NamedTuple):
    """What a chunk tells about a site: T merged tokens of ``[B, n]``."""

    h: Tensor
    """What the sublayer's products see, ``[B, n, d]``."""
    ffn: FeedForward
    """The sublayer: an FFN, or attention among this chunk's merged vectors."""
    groups: Groups
    place: Tensor
    """``[T]``: the place of these tokens in the flat list."""
    group: Tensor
    """``[T]``: the group of each."""
    wanted: Tensor
    """Their outputs, ``[T, d]``, fp32."""
    variance: Tensor
    """Of what the norm behind them takes, ``[T, 1]``."""
    held_out: bool

    @property
    def tokens(self) -> Tensor:
        """``h`` of these tokens, ``[T, d]``."""
        return self.h.flatten(0, 1)[self.place].float()


def hidden(x: Tensor, ffn: FeedForward) -> Tensor:
    """What the sublayer's products see."""
    if ffn.post_norm:
        return x
    return normalize(x, ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)


def part(x: Tensor, dense: Tensor, groups: Groups, ffn: FeedForward, held_out: bool) -> Part:
    """Of ``x [B, n, d]`` and what the dense model has behind the site. Kept tokens bypass the
    plugin, so they are none of its business."""
    group, used = merged_tokens(x, groups)
    place = used.nonzero()[:, 0]
    y = dense.flatten(0, 1)[place].float()
    centred = y - y.mean(-1, keepdim=True) if ffn.norm == "layer" else y
    variance = centred.square().mean(-1, keepdim=True)
    wanted = y - x.flatten(0, 1)[place].float()
    return Part(hidden(x, ffn), ffn, groups, place, group[place], wanted, variance, held_out)


class SiteFit:
    """The closed form at one site. ``parts`` makes all of them anew; ``sample`` is some."""

    def __init__(self, sample: Sequence[Part], parts: Callable[[], Iterable[Part]]) -> None:
        self.sample, self.parts = sample, parts
        self.ffn = ffn = sample[0].ffn  # every chunk's has the same norm
        variance = torch.cat([part.variance for part in sample])
        self.floor = 1e-3 * float(variance.mean()) + 1e-30
        self.scale = sample[0].wanted.new_ones(sample[0].wanted.shape[-1])
        if ffn.post_norm and ffn.norm_weight is not None:
            scale = ffn.norm_weight.float().abs()
            self.scale = scale.clamp_min(0.05 * float(scale.max()))

    def fit(
        self, plugin: Any, merge: bool, adapter: bool, other_scores: Sequence[Tensor] = ()
    ) -> None:
        """Gives ``plugin`` its values. ``other_scores [d]`` of merges are tried too."""
        if merge:
            fitted = self._scores()
            tried = [fitted * sharpness for sharpness in SHARPNESS] + list(other_scores)
            errors = []
            for i, scores in enumerate(tried):
                set_merge(plugin.merge, scores)
                pairs = (self.pair(plugin.merge, part) for part in self.sample)
                errors.append((regression(*self.moments(pairs), MILD).error, i))
            set_merge(plugin.merge, tried[min(errors)[1]])
        if adapter:
            pairs = (self.pair(plugin.merge, part) for part in self.parts())
            found = reduced_rank(*self.moments(pairs), plugin.adapter.bottleneck)
            self._set_adapter(plugin, found)

    def pair(self, merge: Any, part: Part) -> tuple[Tensor, Tensor, Part]:
        """``concat(u, h)`` of each token, and what the adapter is to add to u."""
        u = merged(merge, part)
        return torch.cat([u, part.tokens], -1), (part.wanted - u) * self.scale, part

    def spread(self, merge: Any) -> Spread:
        """Of what the sample puts into the adapter, and wants from it."""
        pairs = [self.pair(merge, part) for part in self.sample if not part.held_out]
        z, t, _ = zip(*pairs, strict=True)
        return Spread(torch.cat(z), torch.cat(t) / self.scale)

    def moments(self, pairs: Iterable[tuple[Tensor, Tensor, Part]]) -> tuple[Moments, Moments]:
        """Of what is fitted, and of what is held out."""
        both: tuple[Moments, Moments] | None = None
        for z, t, part in pairs:
            if not len(z):
                continue
            if both is None:
                origin = z.mean(0), t.mean(0)
                both = Moments(*origin), Moments(*origin)
            both[part.held_out].add(z, t, 1 / part.variance.clamp_min(self.floor))
        assert both is not None  # the sample has a token
        if not all(part.zz.isfinite().all() and part.zt.isfinite().all() for part in both):
            raise FloatingPointError(
                "the compressed model's hidden states are not finite: use a wider dtype"
            )
        return both

    def _scores(self) -> Tensor:
        """``[d]``: the linear map of h that fits how badly h alone predicts the output."""
        pairs = [(part.tokens, part.wanted * self.scale, part) for part in self.sample]
        found = regression(*self.moments(pairs), MILD)
        errors = []
        for tokens, wanted, part in pairs:
            left = wanted - found.predict(tokens)
            error = left.square().sum(-1, keepdim=True).clamp_min(1e-12).log()
            errors.append((tokens, error, part))
        return regression(*self.moments(errors), MILD).weight[0]

    def _set_adapter(self, plugin: Any, found: Fit) -> None:
        # A bottleneck wider than the output keeps the initial values of the rest, as features.
        adapter, rank = plugin.adapter, len(found.deviation)
        w1, b1 = adapter.w1.float().clone(), adapter.b1.float().clone()
        w1[:rank] = found.right * (SCALE / found.deviation.clamp_min(1e-12))[:, None]
        b1[:rank] = -w1[:rank] @ found.mean_in

        def inner(z: Tensor, t: Tensor, part: Part) -> tuple[Tensor, Tensor, Part]:
            z = z @ w1.T + b1
            return (torch.tanh(z) if adapter.activation == "tanh" else z), t, part

        pairs = (inner(*self.pair(plugin.merge, part)) for part in self.sample)
        last = regression(*self.moments(pairs))
        w2 = last.weight
        adapter.w1.copy_(w1)
        adapter.b1.copy_(b1)
        adapter.w2.copy_(w2 / self.scale[:, None])
        adapter.b2.copy_((last.mean_out - w2 @ last.mean_in) / self.scale)


def set_merge(merge: Any, scores: Tensor) -> None:
    """Every slot's score looks at that slot's token."""
    k, d = merge.ratio, merge.hidden_size
    weight = torch.zeros(k, k, d, device=scores.device)
    slot = torch.arange(k, device=scores.device)
    weight[slot, slot] = scores
    merge.weight.copy_(weight.reshape(k, k * d))
    merge.bias.zero_()


def merged(merge: Any, part: Part) -> Tensor:
    """u of each token's group, ``[T, d]``."""
    g = group_merge(part.h, merge.weight, merge.bias, part.groups)
    return products(g, part.ffn, linear).flatten(0, -2)[part.group].float()
