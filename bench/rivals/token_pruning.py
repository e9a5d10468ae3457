"""FFNs for the tokens alone that get most attention.

Learned Token Pruning (Kim et al. 2022, arXiv 2107.00910) as the Variator paper compares with it:
the score of a token is the attention that it gets, a mean over heads and queries; tokens of low
scores are no input of the FFN, whose output is 0 for them. :func:`fixed` keeps a share of each
row's tokens, :func:`learned` those above a threshold a layer, which is learned with a soft mask at
first and held while the rest of the model adapts to the hard one. The first token always stays.

Otherwise than in that paper: tokens come back behind the FFN, and the penalty on what is kept ends
at a share that is asked for, so that results are of comparable cost.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bert import Block, Classifier, Tokens

TEMPERATURE = 5e-3
"""Of the soft mask. A sentence of 25 tokens has scores around 0.04."""
SOFT = 0.5
"""The part of the steps in which thresholds learn."""
RATE = 1e-3
"""Of thresholds."""


class Scored(Block):
    """A block that looks at attention's weights."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, real: Tensor) -> Any:
        """Besides: scores ``[B, n]``."""
        weights = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            weights = weights.masked_fill(~mask, -torch.inf)
        weights = weights.softmax(-1)
        queries = (real / real.sum(-1, keepdim=True)).to(q.dtype)
        scores = (queries[:, None] @ weights.mean(1))[:, 0]
        return weights @ v, scores

    def some(self, x: Tensor, index: Tensor) -> Tensor:
        """The FFN sublayer of ``x [B, n, d]`` for the vectors of these indices, others with 0 in
        the place of the FFN's output."""
        rows = x.reshape(-1, x.shape[-1])
        self.work = *self.work[:2], len(index)
        y = self.layer.output.LayerNorm(rows)
        return y.index_copy(0, index, self.feed_forward(rows[index])).view(x.shape)


class Fixed(Scored):
    def __init__(self, layer: Any, share: float) -> None:
        super().__init__(layer)
        self.share = share

    def forward(self, tokens: Tokens) -> Tokens:
        x, scores = self.attention(tokens)
        return tokens._replace(x=self.some(x, largest(scores, tokens.real, self.share)))


def largest(scores: Tensor, real: Tensor, share: float) -> Tensor:
    """Indices into ``[B * n]`` of the best of each row, its first among them; rounded up."""
    counts = torch.ceil(real.sum(-1) * share - 1e-6)
    scores = scores.masked_fill(~real, -torch.inf)
    scores[:, 0] = torch.inf
    best = scores.topk(int(counts.max()), -1).indices
    taken = torch.arange(best.shape[1]) < counts[:, None]
    return (best + torch.arange(len(best))[:, None] * scores.shape[1])[taken]


class Learned(Scored):
    def __init__(self, layer: Any, start: float) -> None:
        super().__init__(layer)
        self.threshold = nn.Parameter(torch.tensor(start))
        self.soft = False
        self.kept: list[Tensor] = []
        """Shares of tokens that soft masks kept, until somebody takes them."""

    def forward(self, tokens: Tokens) -> Tokens:
        x, scores = self.attention(tokens)
        above = scores - self.threshold
        first = torch.zeros_like(tokens.real)
        first[:, 0] = True
        if self.soft and torch.is_grad_enabled():
            mask = torch.where(first, 1.0, (above / TEMPERATURE).sigmoid()) * tokens.real
            self.kept.append(mask.sum() / tokens.real.sum())
            layer = self.layer
            out = layer.output.dense(layer.intermediate(x))
            return tokens._replace(x=layer.output.LayerNorm(x + mask[..., None] * out))
        kept = ((above > 0) | first) & tokens.real
        return tokens._replace(x=self.some(x, kept.flatten().nonzero()[:, 0]))


class LearnedClassifier(Classifier):
    """``progress``: the part of the steps that are done, which the trainer tells."""

    def __init__(self, model: Any, share: float) -> None:
        starts = iter(0.01 * (i + 1) / model.config.num_hidden_layers for i in range(1 << 30))
        super().__init__(model, lambda layer: Learned(layer, next(starts)))
        self.share = share
        self.progress = 0.0

    @property
    def progress(self) -> float:
        return self._progress

    @progress.setter
    def progress(self, done: float) -> None:
        self._progress = done
        for block in self.blocks:
            block.soft = done < SOFT

    def penalty(self) -> Tensor | None:
        kept = [block.kept.pop() for block in self.blocks if block.kept]
        return F.relu(torch.stack(kept).mean() - self.share) if kept else None

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        own = [block.threshold for block in self.blocks]
        known = set(map(id, own))
        rest = [p for p in self.parameters() if id(p) not in known]
        return [{"params": rest, "lr": rate}, {"params": own, "lr": RATE}]


def fixed(model: Any, share: float) -> Classifier:
    """``share`` of each row's tokens pass the FFNs, rounded up; 1: all."""
    return Classifier(model, lambda layer: Fixed(layer, share))


def learned(model: Any, share: float) -> Classifier:
    """Thresholds that are to keep at most ``share`` of the tokens on the training data."""
    return LearnedClassifier(model, share)
