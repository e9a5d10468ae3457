"""The start ``"pca"``: the stream in its principal components, everything else by least squares.

One orthonormal basis Q ``[d, d']`` holds the principal components of the RMS-normalised stream. The
small model's stream is ``Qᵀ x``, but for what its blocks lose. So what each matrix reads in the
original is fitted by what it reads in the small model, whose blocks below are made already; and the
A of what writes to the stream takes up what its blocks have lost so far, where that can be told.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...sites.residual import Block, Layout, Sublayer
from . import calibration_data as data
from .assemble import Builder, Factors
from .calibration_data import Batch
from .constants import Constants
from .importance import Importance
from .neurons import survivors
from .regression import RIDGES, Moments
from .selection import picks
from .sizes import Sizes
from .streams import Streams


def closed_form(
    builder: Builder,
    scores: Importance | None,
    sizes: Sizes,
    own: Sizes,
    fold: Constants,
    batches: list[Batch],
) -> None:
    """Fill ``builder``. ``scores``: of FFN neurons; None: those stay that the output needs most.
    ``fold``: by how much more the original multiplies than the small model."""
    _ClosedForm(builder, scores, sizes, own, fold, batches).all()


def principal(model: Any, layout: Layout, batches: list[Batch], size: int) -> Tensor:
    """``[d, size]`` in float64: principal components of what the norms' inputs are, divided by
    their root mean squares, over all norms and tokens."""
    total: Tensor | None = None
    forwards = data.Forwards(model, layout)

    def add(module: nn.Module, args: Any) -> None:
        nonlocal total
        x = data.tokens(args[0], forwards.mask)
        x = x * x.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
        moments = x.mT @ x
        total = moments if total is None else total + moments

    hooks = []
    for stack in layout.stacks:
        norms = {part.norm for block in stack.blocks for part in block.sublayers} | {stack.norm}
        hooks += [model.get_submodule(n).register_forward_pre_hook(add) for n in sorted(norms)]
    forwards.run(batches, hooks)
    assert total is not None
    if not bool(torch.isfinite(total).all()):
        raise FloatingPointError("the model's hidden states on batches are not finite")
    return torch.linalg.eigh(total).eigenvectors[:, -size:].flip(1)


class _ClosedForm:
    def __init__(
        self,
        builder: Builder,
        scores: Importance | None,
        sizes: Sizes,
        own: Sizes,
        fold: Constants,
        batches: list[Batch],
    ) -> None:
        self.builder, self.scores, self.sizes, self.own = builder, scores, sizes, own
        self.layout, self.fold = builder.layout, fold
        self.q: Tensor | None = None
        if self.layout.residual is not None and sizes.hidden < own.hidden:
            self.q = principal(builder.model, self.layout, batches, sizes.hidden)
        self.memory: Tensor | None = None
        """P_in of what reads an earlier stack's output."""
        self.batches = batches

    @property
    def back(self) -> Tensor | None:
        """P_out to the stream."""
        return None if self.q is None else self.q.mT

    def all(self) -> None:
        builder, layout = self.builder, self.layout
        shared = layout.tied and not builder.untied
        factor = self.fold.embedding
        if layout.residual is not None:
            builder.matrix(
                layout.embeddings[0], Factors(None if self.q is None else self.q * factor)
            )
        streams = Streams(builder.model, builder.small, layout, self.batches)
        last = len(layout.stacks) - 1
        for position, stack in enumerate(layout.stacks):
            streams.begin(position)
            for block in stack.blocks:
                for part in block.sublayers:
                    self._sublayer(streams, position, block, part)
                streams.advance(block)
            if layout.residual is None:
                continue
            if position == last and layout.head and shared:
                self._tied_head(streams, position, factor)
            else:
                self._last_norm(streams, position, last)
            streams.end(position, stack)

    def _sublayer(self, streams: Streams, position: int, block: Block, part: Sublayer) -> None:
        builder = self.builder
        inner = None
        if part.inner and self.sizes.ffn < self.own.ffn:
            inner = picks(self._neurons(streams, position, block, part), self.own.ffn)
        ffn = None if inner is None else inner.mT
        p_in = None
        if part.norm and self.layout.residual is not None:
            p_in = self._behind(part.norm, lambda: streams.inputs(position, block, part.reads[0]))
        for name in part.reads:
            builder.matrix(name, Factors(p_in, ffn))
            builder.bias(name, ffn)
        for name in part.memory:
            builder.matrix(name, Factors(self.memory))
            builder.bias(name, None)
        if inner is not None:
            pairs = streams.inputs(position, block, part.writes)
            inner = Moments(pairs).fitted(inner)
        addition = self._correction(streams, position, block, part, inner)
        builder.matrix(part.writes, Factors(inner, self.back, addition))
        builder.bias(part.writes, self.back)

    def _neurons(self, streams: Streams, position: int, block: Block, part: Sublayer) -> Tensor:
        """Those that stay."""
        if self.scores is not None:
            return self.scores.kept_ffn(part, self.sizes.ffn)
        weight = self.builder.originals[f"{part.writes}.weight"].double()
        weight = weight if self.q is None else self.q.mT @ weight
        moments: Any = 0.0
        for reads in streams.originals(position, block, part.writes):
            moments = moments + reads.mT @ reads
        if not bool(torch.isfinite(moments).all()):
            raise FloatingPointError("the model's activations on batches are not finite")
        return survivors(moments, weight, self.sizes.ffn)

    def _correction(
        self, streams: Streams, position: int, block: Block, part: Sublayer, inner: Tensor | None
    ) -> Tensor | None:
        """A of what writes to the stream: what P_out · W · P_in leaves of the way back to the
        original's stream, as far as its input tells. None where the stream is not known (BERT)."""
        if not part.norm:
            return None
        names = [other.norm for other in block.sublayers]
        later = [*names, ""][names.index(part.norm) + 1]
        plain = self.builder.originals[f"{part.writes}.weight"].double()
        plain = plain if self.q is None else self.q.mT @ plain
        plain = plain if inner is None else plain @ inner
        bias = self.builder.originals.get(f"{part.writes}.bias")
        shift = 0.0 if bias is None else bias.double() if self.q is None else bias.double() @ self.q
        drifts = streams.drifts(position, block, part, later, self.q)
        moments = Moments((wanted - shift, reads) for wanted, reads in drifts)
        return moments.fitted(plain, rescale=False) - plain

    def _behind(self, norm: str, pairs: Any, factor: float = 1.0) -> Tensor | None:
        """P_in of what reads a norm, whose gain is set so that columns of P_in have length 1."""
        gain = self.builder.gain(norm)
        if self.q is None:
            self.builder.set_gain(norm, gain)
            return None
        self.builder.set_gain(norm, torch.ones_like(gain[: self.sizes.hidden]))
        fitted = Moments(pairs()).fitted(gain[:, None] * self.q)
        lengths = fitted.norm(dim=0).clamp_min(1e-12)
        self.builder.set_gain(norm, lengths * factor)
        return fitted / lengths

    def _last_norm(self, streams: Streams, position: int, last: int) -> None:
        layout, stack = self.layout, self.layout.stacks[position]
        ends = position == last
        head = self.fold.head if ends and layout.head and self.q is not None else 1.0
        p_in = self._behind(stack.norm, lambda: streams.outputs(position, stack), head)
        if not ends:
            self.memory = p_in
        elif layout.head:
            self.builder.matrix(layout.head, Factors(p_in))
            self.builder.bias(layout.head, None)

    def _tied_head(self, streams: Streams, position: int, factor: float) -> None:
        """The head is the embedding, ``E · Q``: only the gain g is free. Least squares of the
        logits ``E h`` by ``E Q (g ⊙ x)``."""
        stack, builder = self.layout.stacks[position], self.builder
        gain = builder.gain(stack.norm)
        if self.q is None:
            builder.set_gain(stack.norm, gain)
            return
        builder.set_gain(stack.norm, torch.ones_like(gain[: self.sizes.hidden]))
        moments = Moments(streams.outputs(position, stack))
        weight = builder.originals[f"{self.layout.head}.weight"].double()
        small = weight @ self.q
        system = (small.mT @ small) * sum(moments.xx)
        right = ((small.mT @ weight) * sum(moments.yx).mT).sum(1)
        system.diagonal().add_(RIDGES[0] * system.diagonal().mean())
        found = torch.linalg.solve(system, right)
        builder.set_gain(stack.norm, found * self.fold.head / factor)
        builder.bias(self.layout.head, None)
