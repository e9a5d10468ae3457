"""A few passes of gradient descent at one site, from the closed form on.

The closed form sees a linear map and squared errors in front of the norm. What is left is the
merge, the tanh and the norm: each step runs the whole sublayer on some rows of a chunk, and
compares what it gives with what the dense model has there. No gradient leaves the site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ....ops.compressed_ffn import run
from ....ops.feed_forward import FeedForward, PluginWeights, normalize, products
from ....ops.groups import Groups
from .inputs import merged_tokens

TOKENS = 512
"""Of a step, with padding."""
LEAST_STEPS = 100
"""With few tokens, of as many passes as it takes."""
RATE, WARM_UP = 1e-3, 10
"""Adam's, for inputs and outputs of variance 1; falls linearly to zero."""


class Spread:
    """Standard deviations ``[2d]`` of ``concat(u, h)`` and ``[d]`` of what the adapter adds to u.

    The descent takes its steps in parameters of standardised inputs and outputs, whatever the
    model's scale.
    """

    def __init__(self, z: Tensor, t: Tensor) -> None:
        def deviation(x: Tensor) -> Tensor:
            found = x.std(0, correction=0)
            return found.clamp_min(1e-3 * float(found.mean()) + 1e-30)

        self.z, self.t = deviation(z), deviation(t)

    def scales(self, ratio: int) -> tuple[Tensor, ...]:
        """Of merge weight and bias, W_1, b_1, W_2, b_2: a parameter over its standardised form."""
        one = self.z.new_ones(())
        h = self.z[self.z.shape[0] // 2 :]
        return 1 / h.repeat(ratio), one, 1 / self.z, one, self.t[:, None], self.t


class Behind(NamedTuple):
    """What a chunk tells about a site."""

    x: Tensor
    """Its input, ``[B, n, d]``."""
    wanted: Tensor
    """What the dense model has behind it, and behind a norm that follows; fp32."""
    weight: Tensor
    """``[B, n]``: what a token's error weighs; nothing for padding and for kept tokens, which
    bypass the plugin."""
    groups: Groups
    positions: Tensor | None = None
    """Position ids ``[B, n]``, where attention asks for them."""


Sublayer = Callable[[Tensor, Groups, Tensor | None], FeedForward]
"""What a plugin goes around, of ``x [B, n, d]``, its groups and position ids."""


def behind(
    x: Tensor,
    dense: Tensor,
    groups: Groups,
    ffn: FeedForward,
    floor: float,
    weights: Tensor | None,
    positions: Tensor | None = None,
) -> Behind:
    """Of ``x [B, n, d]`` and what the dense model has behind the site, in front of a norm.

    ``weights [B, n]``: of each token. None: all alike behind a norm, else one over the token's
    variance, which is at least ``floor``.
    """
    weight = merged_tokens(x, groups)[1].view(x.shape[:2]).float()
    wanted = dense.float()
    if weights is not None:
        weight = weight * weights
    elif not ffn.post_norm:
        weight = weight / wanted.square().mean(-1).clamp_min(floor)
    if ffn.post_norm:
        wanted = normalize(wanted, *ffn.any_norm).float()
    return Behind(x, wanted, weight, groups, positions)


def descend(
    plugin: Any,
    sublayer: Sublayer,
    spread: Spread,
    root: Tensor | None,
    chunks: Sequence[Callable[[], Behind]],
    backend: str,
    passes: int,
    merge: bool,
    adapter: bool,
) -> None:
    """Moves ``plugin`` towards the sublayer's dense outputs.

    Args:
        root: ``[d, d]``, errors ``e [.., d]`` count as ``e @ root``; None: as they are.
        chunks: make what there is to fit to.
        passes: over all of it, at least.
        merge, adapter: which parts move.
    """
    weights = plugin.weights()
    parameters: list[Any] = list(weights[:6])
    moving = [i for i in range(6) if (merge if i < 2 else adapter)]
    scales = spread.scales(weights.ratio)

    def loss(rows: Behind, found: list[Tensor]) -> Tensor:
        values = list(parameters)
        for i, value in zip(moving, found, strict=True):
            values[i] = value
        now = weights._replace(**dict(zip(weights._fields, values, strict=False)))
        ffn = sublayer(rows.x, rows.groups, rows.positions)
        return _loss(rows, now, ffn, root, backend)

    moved = [parameters[i] for i in moving]
    minimise(moved, [scales[i] for i in moving], loss, chunks, passes)


def minimise(
    parameters: Sequence[Tensor],
    scales: Sequence[Tensor],
    loss: Callable[[Behind, list[Tensor]], Tensor],
    chunks: Sequence[Callable[[], Behind]],
    passes: int,
) -> None:
    """Moves ``parameters`` in place towards a lower ``loss(rows, values)``.

    ``scales``: a parameter over its standardised form. ``chunks`` make what there is to fit to, of
    which a step takes some rows.
    """
    leaves = [p.detach().float() / scale for p, scale in zip(parameters, scales, strict=True)]
    steps = sum(len(_slices(chunk().x)) for chunk in chunks)
    if not steps or not leaves:
        return
    passes = max(passes, math.ceil(LEAST_STEPS / steps))
    generator, done = torch.Generator().manual_seed(0), 0

    def values() -> list[Tensor]:
        triples = zip(leaves, scales, parameters, strict=True)
        return [(leaf * scale).to(parameter.dtype) for leaf, scale, parameter in triples]

    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        adam = torch.optim.Adam(leaves, betas=(0.9, 0.98))
        for _ in range(passes):
            for chunk in _shuffled(chunks, generator):
                site = chunk()
                for begin, end in _shuffled(_slices(site.x), generator):
                    left = 1 - done / (passes * steps)
                    adam.param_groups[0]["lr"] = RATE * min((done + 1) / WARM_UP, left)
                    found = torch.autograd.grad(loss(_rows(site, begin, end), values()), leaves)
                    for leaf, gradient in zip(leaves, found, strict=True):
                        leaf.grad = gradient
                    adam.step()
                    done += 1
    for parameter, value in zip(parameters, values(), strict=True):
        parameter.copy_(value.detach())


def differentiable(ffn: FeedForward, groups: Groups, width: int) -> bool:
    """Whether gradients pass the sublayer: those of some quantised modules cannot."""
    if ffn.module is None:
        return True
    with torch.enable_grad():
        try:
            assert groups.start is not None
            merged = ffn.w_out.new_zeros(*groups.start.shape, width)
            return products(merged.requires_grad_(), ffn).requires_grad
        except (RuntimeError, NotImplementedError):
            return False


def _loss(
    rows: Behind, weights: PluginWeights, ffn: FeedForward, root: Tensor | None, backend: str
) -> Tensor:
    y = run(rows.x, weights, ffn, rows.groups, backend).float()
    return weighted(y if ffn.residual else rows.x.float() + y, rows, root)


def weighted(y: Tensor, rows: Behind, root: Tensor | None) -> Tensor:
    """The weighted mean square of what ``y`` is off."""
    # What padding holds must not reach a gradient.
    error = torch.where(rows.weight[..., None] > 0, y - rows.wanted, 0)
    squared = (error if root is None else error @ root).square().mean(-1)
    return (squared * rows.weight).sum() / rows.weight.sum().clamp_min(1e-30)


def _slices(x: Tensor) -> list[tuple[int, int]]:
    """Rows of about :data:`TOKENS` tokens."""
    rows = max(1, TOKENS // x.shape[1])
    return [(i, min(i + rows, len(x))) for i in range(0, len(x), rows)]


def _rows(site: Behind, begin: int, end: int) -> Behind:
    start, span, _, kept, mask = (None if t is None else t[begin:end] for t in site.groups[:5])
    assert start is not None  # the groups are listed
    start = (start - begin * site.x.shape[1]).clamp_min(0)  # an empty group may start anywhere
    groups = site.groups._replace(start=start, span=span, kept=kept, mask=mask, owned=None)
    x, wanted, weight = (part[begin:end] for part in site[:3])
    positions = None if site.positions is None else site.positions[begin:end]
    return Behind(x, wanted, weight, groups, positions)


T = TypeVar("T")


def _shuffled(given: Sequence[T], generator: torch.Generator) -> list[T]:
    return [given[i] for i in torch.randperm(len(given), generator=generator).tolist()]
