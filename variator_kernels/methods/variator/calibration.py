"""Initial values of plugins in closed form, from a few hundred sequences and no training.

The model runs over all sequences once a ratio. Before a sublayer does, its plugin is fitted to what
the dense model has behind that sublayer, on inputs that the sublayers before, fitted already, have
compressed:

- the merge: tokens whose FFN output a linear map of rank r cannot predict get more weight. The
  scores are the least-squares fit of that error's logarithm, times the factor that serves best;
- the adapter: the best map of rank r from ``concat(u, h)`` to the wanted output less u
  (reduced-rank regression), scaled so that tanh is close to linear, and then W_2 once more by least
  squares on the tanh's real outputs.

How strongly the regressions are regularised is decided on sequences held out from them. Tokens
weigh by one over their residual's variance, hidden dimensions by the norm's weight where the norm
follows (BERT): that is how much an error matters behind the norm.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import backends, checks
from ...ops import prepack
from ...ops.feed_forward import FeedForward, normalize, products
from ...ops.group_merge.reference import group_merge
from ...ops.groups import Groups, token_slots
from ...ops.prepacked_linear import FrozenProducts, linear
from ...runtime.levels import use_ratio
from ...runtime.state import STATE, State, observe, states
from ...sites.feed_forward import describe
from ...sites.find import find
from ...sites.wrappers import check_values
from .method import plugin_parameters
from .regression import Fit, Moments, reduced_rank

SHARPNESS = (0.0, 1.0, 2.0, 4.0)
"""Factors tried on the merge's fitted scores; 0 is a mean."""
SCALE = 0.4
"""Standard deviation of what goes into tanh."""
HELD_OUT = 5
"""Each fifth sequence decides about regularisation."""
LEAST = 2 * HELD_OUT
"""Sequences."""


class _Sample(NamedTuple):
    """What a plugin is fitted to: T real tokens of B rows, without those that stay whole."""

    h: Tensor
    """What the FFN sees, ``[B, n, d]``."""
    mask: Tensor
    """``[B, n]`` bool: the T tokens."""
    groups: Groups
    """Of ``h``."""
    tokens: Tensor
    """``h`` of them, ``[T, d]``."""
    wanted: Tensor
    """Their outputs, ``[T, d]``."""
    weight: Tensor
    """``[T, 1]``"""
    scale: Tensor
    """Of the hidden dimensions, ``[d]``."""
    held_out: Tensor
    """``[T]`` bool."""

    def moments(self, z: Tensor, t: Tensor) -> tuple[Moments, Moments]:
        """Of ``z [T, p]`` and ``t [T, q]``: of what is fitted, and of what is held out."""
        parts, origin = [], (z.mean(0), t.mean(0))
        for part in (~self.held_out, self.held_out):
            parts.append(Moments(*origin))
            parts[-1].add(z[part], t[part], self.weight[part])
        return parts[0], parts[1]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    ratios: Iterable[int] | None = None,
    *,
    merge: bool = True,
    adapter: bool = True,
) -> None:
    """Give the plugins of a patched model initial values that fit these inputs.

    Takes memory for all sequences at once: the hidden states of every layer, and one layer's inner
    activations; on the CPU kernels also for packed copies of the encoder's linear weights, which
    are freed at the end together with those that inference made of this model, and makes again.

    Args:
        model: patched. Its other parameters stay as they are.
        batches: arguments of the model, ``attention_mask`` among them; a few hundred sequences
            of what it will be used on, or of plain text.
        ratios: which plugins; by default all.
        merge, adapter: which parts; the other keeps its values.

    Raises:
        ValueError: the model is not patched, has no plugins for a ratio, or no values (on the
            meta device); or ``batches`` has fewer than 10 sequences, no ``attention_mask``, or
            (almost) no token that is not kept whole.
            TypeError: ``batches`` does not hold mappings. FloatingPointError: the hidden states
            are not finite. All plugins have their old values then.
    """
    states(model)
    found = find(model)
    check_values(found.encoder)
    state: State = vars(found.encoder)[STATE]
    wanted = list(state.ratios if ratios is None else ratios)
    for k in wanted:
        state.check(checks.ratio(k, "ratios"))
    wanted = [k for k in wanted if k > 1]
    on_cpu = backends.resolve(state.method.config.backend, found.like(0)) == "cpu"
    batches = list(batches)
    inputs = _joined(batches, inspect.signature(found.encoder.forward).parameters)
    batches = [batch for batch in batches if len(batch["attention_mask"])]
    real = inputs["attention_mask"] != 0
    dense: list[list[Tensor]] = []  # of each batch, what is behind each FFN

    def keep(real: Tensor, layer: nn.Module, x: Tensor, mask: Tensor | None, k: int) -> None:
        ffn = describe(layer)
        dense[-1].append(x[real] + products(_hidden(x[real], ffn), ffn, linear))
        if not dense[-1][-1].isfinite().all():
            raise FloatingPointError(
                f"the dense model's hidden states behind FFN {len(dense[-1]) - 1} are not finite: "
                "look for non-finite weights and inputs, or use a wider dtype"
            )

    def fit(place: Iterator[int], layer: Any, x: Tensor, mask: Tensor | None, k: int) -> None:
        ffn, i = describe(layer), next(place)
        sample = _sample(
            x, real, state.groups(x, k), torch.cat([behind[i] for behind in dense]), ffn
        )
        _fit(layer.plugins[str(k)], ffn, sample, merge, adapter)

    before = [(parameter, parameter.clone()) for parameter in plugin_parameters(model, wanted)]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    warned, state.warned = state.warned, True
    try:
        with FrozenProducts(found.encoder) if on_cpu else nullcontext():
            for batch in batches:
                here = batch["attention_mask"] != 0
                dense.append([])
                with observe(state, partial(keep, here)), use_ratio(model, 1):
                    found.encoder(**{key: batch[key] for key in inputs})
            for ratio in wanted:
                with observe(state, partial(fit, itertools.count())), use_ratio(model, ratio):
                    found.encoder(**inputs)
    except BaseException:
        for parameter, value in before:
            parameter.copy_(value)
        raise
    finally:
        state.warned = warned
        prepack.cache.forget(model.parameters())
        for module, training in modes:
            module.training = training


def _joined(batches: Sequence[Mapping[str, Tensor]], names: Iterable[str]) -> dict[str, Tensor]:
    """All sequences as one batch, padded on the right; only what the encoder takes."""
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(
                "batches must be several mappings such as a tokenizer returns, got one of "
                f"{type(batch).__name__}: is it a single batch, without a list around it?"
            )
        if batch.get("attention_mask") is None:
            raise ValueError(f"batches must hold attention_mask, got {sorted(batch)}")
    rows = sum(len(batch["attention_mask"]) for batch in batches)
    if rows < LEAST:
        raise ValueError(f"batches must hold at least {LEAST} sequences, got {rows}")
    width = max(batch["attention_mask"].shape[1] for batch in batches)

    def padded(tensor: Tensor) -> Tensor:
        missing = width - tensor.shape[1]
        return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))

    keys = [key for key in names if key in batches[0]]
    return {key: torch.cat([padded(batch[key]) for batch in batches]) for key in keys}


def _hidden(x: Tensor, ffn: FeedForward) -> Tensor:
    """What the FFN sees."""
    if ffn.post_norm:
        return x
    return normalize(x, ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)


def _sample(x: Tensor, real: Tensor, groups: Groups, dense: Tensor, ffn: FeedForward) -> _Sample:
    mask = real
    if groups.kept is not None:
        slot, merged = token_slots(groups, real.numel())
        merged = merged & ~groups.kept.flatten()[slot // groups.ratio]
        mask = real & merged.view(real.shape)
    row = torch.arange(len(x), device=x.device)[:, None].expand(mask.shape)[mask]
    held_out = row % HELD_OUT == 1
    if not bool(held_out.any()) or bool(held_out.all()):
        raise ValueError(
            f"batches must hold tokens that are not kept whole, among every {HELD_OUT} sequences "
            "and besides: there is nothing to fit"
        )
    y = dense[mask[real]].float()
    centred = y - y.mean(-1, keepdim=True) if ffn.norm == "layer" else y
    variance = centred.square().mean(-1, keepdim=True)
    scale = y.new_ones(y.shape[-1])
    if ffn.post_norm and ffn.norm_weight is not None:
        scale = ffn.norm_weight.float().abs()
        scale = scale.clamp_min(0.05 * float(scale.max()))
    h = _hidden(x, ffn)
    return _Sample(
        h,
        mask,
        groups,
        h[mask].float(),
        y - x[mask].float(),
        1 / variance.clamp_min(1e-3 * float(variance.mean()) + 1e-30),
        scale,
        held_out,
    )


def _fit(plugin: Any, ffn: FeedForward, sample: _Sample, merge: bool, adapter: bool) -> None:
    rank = plugin.adapter.bottleneck
    scores = _scores(sample, rank) if merge else None
    kept = [parameter.clone() for parameter in plugin.merge.parameters()]
    best = None
    for sharpness in SHARPNESS if merge else (None,):
        if scores is not None:
            _set_merge(plugin.merge, float(sharpness or 0) * scores)
        merged = _merged(plugin.merge, ffn, sample)
        z, t = torch.cat([merged, sample.tokens], -1), (sample.wanted - merged) * sample.scale
        found = reduced_rank(*sample.moments(z, t), rank)
        if best is None or found.error < best[0].error:
            best, kept = (found, z, t), [p.clone() for p in plugin.merge.parameters()]
    for parameter, value in zip(plugin.merge.parameters(), kept, strict=True):
        parameter.copy_(value)
    if adapter and best is not None:
        _set_adapter(plugin.adapter, *best, sample)


def _scores(sample: _Sample, rank: int) -> Tensor:
    """``[d]``: the linear map of h that fits how badly h alone predicts the output."""
    wanted = sample.wanted * sample.scale
    found = reduced_rank(*sample.moments(sample.tokens, wanted), rank)
    left = wanted - found.predict(sample.tokens)
    error = left.square().sum(-1, keepdim=True).clamp_min(1e-12).log()
    line = reduced_rank(*sample.moments(sample.tokens, error), 1)
    return (line.left @ line.right)[0]


def _set_merge(merge: Any, scores: Tensor) -> None:
    """Every slot's score looks at that slot's token."""
    k, d = merge.ratio, merge.hidden_size
    weight = torch.zeros(k, k, d, device=scores.device)
    slot = torch.arange(k, device=scores.device)
    weight[slot, slot] = scores
    merge.weight.copy_(weight.reshape(k, k * d))
    merge.bias.zero_()


def _merged(merge: Any, ffn: FeedForward, sample: _Sample) -> Tensor:
    """u of each real token's group, ``[T, d]``."""
    g = group_merge(sample.h, merge.weight, merge.bias, sample.groups).flatten(0, 1)
    slot, _ = token_slots(sample.groups, sample.mask.numel())
    # Most groups of rows much shorter than the longest hold padding alone.
    used, place = (slot // merge.ratio)[sample.mask.flatten()].unique(return_inverse=True)
    return products(g[used], ffn, linear)[place].float()


def _set_adapter(adapter: Any, found: Fit, z: Tensor, t: Tensor, sample: _Sample) -> None:
    # A bottleneck wider than the output keeps the initial values of the rest, as further features.
    rank = len(found.deviation)
    w1, b1 = adapter.w1.float().clone(), adapter.b1.float().clone()
    w1[:rank] = found.right * (SCALE / found.deviation.clamp_min(1e-12))[:, None]
    b1[:rank] = -w1[:rank] @ found.mean_in
    inner = z @ w1.T + b1
    inner = torch.tanh(inner) if adapter.activation == "tanh" else inner
    last = reduced_rank(*sample.moments(inner, t), adapter.bottleneck)
    w2 = last.left @ last.right
    adapter.w1.copy_(w1)
    adapter.b1.copy_(b1)
    adapter.w2.copy_(w2 / sample.scale[:, None])
    adapter.b2.copy_((last.mean_out - w2 @ last.mean_in) / sample.scale)
