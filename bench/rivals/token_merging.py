"""Fewer tokens in each layer: the most similar ones are merged.

Token Merging (Bolya et al. 2023, arXiv 2210.09461): behind attention every second token looks for
the most similar of the others, by the mean of its heads' keys; the best pairs become their mean,
weighed by how many tokens they stand for, and attention weighs keys by that number too. Tokens keep
their order, the first one stays alone, and a row's number of merges follows its own length.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bert import Block, Classifier, Tokens


class Merging(Block):
    def __init__(self, layer: Any, share: float) -> None:
        super().__init__(layer)
        self.share = share

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, real: Tensor) -> Any:
        """Besides: what similarity is measured by, ``[B, n, d / heads]``."""
        return super().attend(q, k, v, mask, real)[0], k.mean(1)

    def forward(self, tokens: Tokens) -> Tokens:
        x, metric = self.attention(tokens)
        return self.whole(merge(tokens._replace(x=x), metric, self.share))


class MergingClassifier(Classifier):
    aligned = False


def merge(tokens: Tokens, metric: Tensor, share: float) -> Tokens:
    """At most ``share`` of each row's tokens, rounded down, go into others."""
    x, real, size = tokens
    counts = torch.floor(real.sum(-1) * share + 1e-6)
    if not bool(counts.any()):
        return tokens
    size = x.new_ones(real.shape) if size is None else size
    unit = F.normalize(metric, dim=-1)
    left, right = slice(1, None, 2), slice(0, None, 2)
    similar = unit[:, left] @ unit[:, right].mT
    similar = similar.masked_fill(~(real[:, left, None] & real[:, None, right]), -torch.inf)
    similar[:, :, 0] = -torch.inf
    best, partner = similar.max(-1)
    rank = best.argsort(-1, descending=True).argsort(-1)
    gone = (rank < counts[:, None]) & best.isfinite()
    moved = size[:, left] * gone
    total = size[:, right].scatter_add(1, partner, moved)
    into = partner[..., None].expand(-1, -1, x.shape[-1])
    mean = x[:, right] * size[:, right, None]
    mean = mean.scatter_add(1, into, x[:, left] * moved[..., None]) / total[..., None]
    x, size, real = x.clone(), size.clone(), real.clone()
    x[:, right], size[:, right] = mean, total
    real[:, left] &= ~gone
    order = (~real).byte().argsort(dim=-1, stable=True)[:, : int(real.sum(-1).max())]
    x = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
    return Tokens(x, real.gather(1, order), size.gather(1, order))


def merging(model: Any, share: float) -> Classifier:
    """``share`` of the tokens that are left are merged in every layer; 0: none."""
    return MergingClassifier(model, lambda layer: Merging(layer, share))
