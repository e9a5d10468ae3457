"""Initial values of plugins in closed form, from a few hundred sequences and no training.

Layer by layer, on inputs that the layers before have already compressed, a plugin is fitted to what
the dense model has after that sublayer:

- the merge: tokens whose FFN output a linear map of rank r cannot predict get more weight. The
  scores are the least-squares fit of that error's logarithm, times the factor that serves best;
- the adapter: the best map of rank r from ``concat(u, h)`` to the dense output less u
  (reduced-rank regression), scaled so that tanh is close to linear, and then W_2 once more by least
  squares on the tanh's real outputs.

How strongly the regressions are regularised is decided on sequences held out from them. Tokens
weigh by one over their residual's variance, hidden dimensions by the norm's weight where the norm
follows (BERT): that is how much an error matters behind the norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .feed_forward import FeedForward, normalize, products
from .grouping import token_slots
from .models.describe import describe
from .models.find import find
from .ops.group_merge.reference import group_merge
from .ratio import STATE, PluginState, observe, states, use_ratio
from .regression import Moments, reduced_rank

SHARPNESS = (0.0, 0.5, 1.0, 2.0)
"""Factors tried on the merge's fitted scores; 0 is a mean."""
SCALE = 0.4
"""Standard deviation of what goes into tanh."""
HELD_OUT = 5
"""Each fifth batch decides about regularisation."""


class _Tokens(NamedTuple):
    """One batch at one layer; ``x [B, n, d]``, ``mask [B, n]``; for real tokens: ``h [T, d]``, the
    wanted FFN output ``o [T, d]`` and the weight ``[T, 1]``."""

    x: Tensor
    mask: Tensor
    h: Tensor
    o: Tensor
    weight: Tensor


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

    Args:
        model: patched. Its other parameters stay as they are.
        batches: keyword arguments of the model, ``attention_mask`` among them; a few hundred
            sequences, in 10 batches or more. All are kept, with one layer's inputs.
        ratios: which plugins; by default all.
        merge, adapter: which parts; the other keeps its values.

    Raises:
        ValueError: the model is not patched or has no plugins for a ratio, or ``batches`` has
            fewer than two, or one without ``attention_mask``.
    """
    states(model)
    found = find(model)
    state: PluginState = vars(found.encoder)[STATE]
    wanted = [state.check(k) for k in (state.ratios if ratios is None else ratios)]
    inputs = list(batches)
    if len(inputs) < 2:
        raise ValueError(f"batches must be at least 2, one to check the other, got {len(inputs)}")
    for batch in inputs:
        if batch.get("attention_mask") is None:
            raise ValueError(f"batches must hold attention_mask, got {sorted(batch)}")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    warned, state.warned = state.warned, True
    try:
        for layer in found.layers:
            ffn = describe(layer)
            dense = [_output(x, ffn) for x, _ in _inputs_of(model, layer, 1, inputs)]
            for ratio in wanted:
                if ratio == 1:
                    continue
                seen = _inputs_of(model, layer, ratio, inputs)
                tokens = [_tokens(x, m, y, ffn) for (x, m), y in zip(seen, dense, strict=True)]
                _fit(layer.plugins[str(ratio)], ffn, tokens, merge, adapter)
    finally:
        state.warned = warned
        for module, training in modes:
            module.training = training


class _Reached(Exception):
    """The sublayer looked for was reached: the rest of the model need not run."""


def _inputs_of(
    model: nn.Module, layer: Any, ratio: int, batches: list[Mapping[str, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """``x [B, n, d]`` that the sublayer gets at this ratio, and the mask, batch by batch."""
    reached: list[Tensor] = []

    def see(sublayer: nn.Module, x: Tensor, mask: Tensor | None, k: int) -> None:
        if sublayer is layer:
            reached.append(x.clone())
            raise _Reached

    for batch in batches:
        with observe(layer.variator_state, see), use_ratio(model, ratio), suppress(_Reached):
            model(**batch)
        yield reached.pop(), batch["attention_mask"] != 0


def _output(x: Tensor, ffn: FeedForward) -> Tensor:
    """The residual stream behind the dense sublayer, before a norm that follows it."""
    return x + products(_hidden(x, ffn), ffn)


def _hidden(x: Tensor, ffn: FeedForward) -> Tensor:
    if ffn.post_norm:
        return x
    return normalize(x, ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)


def _tokens(x: Tensor, mask: Tensor, wanted: Tensor, ffn: FeedForward) -> _Tokens:
    y, real = wanted[mask].float(), x[mask].float()
    centred = y - y.mean(-1, keepdim=True) if ffn.norm == "layer" else y
    variance = centred.square().mean(-1, keepdim=True)
    weight = 1 / variance.clamp_min(1e-3 * variance.mean().clamp_min(1e-30))
    return _Tokens(x, mask, _hidden(x, ffn)[mask].float(), y - real, weight)


def _fit(plugin: Any, ffn: FeedForward, batches: list[_Tokens], merge: bool, adapter: bool) -> None:
    d = batches[0].h.shape[-1]
    scale = torch.ones(d, device=batches[0].h.device)
    if ffn.post_norm and ffn.norm_weight is not None:
        scale = ffn.norm_weight.float().abs()
        scale = scale.clamp_min(0.05 * float(scale.max()))
    rank = plugin.adapter.bottleneck
    scores = _scores(batches, scale, rank) if merge else None
    best = None
    for sharpness in SHARPNESS if merge else (0.0,):
        if scores is not None:
            _set_merge(plugin.merge, sharpness * scores)
        fitted, held_out, merged = _regress(plugin, ffn, batches, scale)
        found = reduced_rank(fitted, held_out, rank)
        if best is None or found.error < best[0]:
            kept = [p.clone() for p in plugin.merge.parameters()]
            best = found.error, found, merged, kept
    assert best is not None
    _, found, merged, kept = best
    for parameter, value in zip(plugin.merge.parameters(), kept, strict=True):
        parameter.copy_(value)
    if adapter:
        _set_adapter(plugin.adapter, found, batches, merged, scale)


def _scores(batches: list[_Tokens], scale: Tensor, rank: int) -> Tensor:
    """``[d]``: the linear map of h that fits how badly h alone predicts the FFN's output."""
    parts = _split([(b.h, b.o * scale, b.weight) for b in batches])
    found = reduced_rank(*parts, rank)
    errors = []
    for b in batches:
        left = b.o * scale - found.predict(b.h)
        errors.append(left.square().sum(-1, keepdim=True).clamp_min(1e-12).log())
    parts = _split([(b.h, e, torch.ones_like(e)) for b, e in zip(batches, errors, strict=True)])
    line = reduced_rank(*parts, 1)
    return (line.left @ line.right)[0]


def _set_merge(merge: Any, scores: Tensor) -> None:
    """Every slot's score looks at that slot's token."""
    k, d = merge.ratio, merge.hidden_size
    weight = torch.zeros(k, k, d, device=scores.device)
    slot = torch.arange(k, device=scores.device)
    weight[slot, slot] = scores
    merge.weight.copy_(weight.reshape(k, k * d))
    merge.bias.zero_()


def _regress(
    plugin: Any, ffn: FeedForward, batches: list[_Tokens], scale: Tensor
) -> tuple[Moments, Moments, list[Tensor]]:
    """Moments of ``concat(u, h)`` and the rest of the wanted output; and u for each token."""
    merged, triples = [], []
    for b in batches:
        h = _hidden(b.x, ffn)
        g = group_merge(h, plugin.merge.weight, plugin.merge.bias, mask=b.mask)
        slot, _ = token_slots(h, plugin.merge.ratio, b.mask, None)
        u = products(g, ffn).flatten(0, 1)[(slot // plugin.merge.ratio)[b.mask]].float()
        merged.append(u)
        triples.append((torch.cat([u, b.h], -1), (b.o - u) * scale, b.weight))
    return *_split(triples), merged


def _set_adapter(
    adapter: Any, found: Any, batches: list[_Tokens], merged: list[Tensor], scale: Tensor
) -> None:
    size = SCALE / found.deviation.clamp_min(1e-12)
    w1 = found.right * size[:, None]
    b1 = -w1 @ found.mean_in
    triples = []
    for b, u in zip(batches, merged, strict=True):
        inner = torch.cat([u, b.h], -1) @ w1.T + b1
        inner = torch.tanh(inner) if adapter.activation == "tanh" else inner
        triples.append((inner, (b.o - u) * scale, b.weight))
    last = reduced_rank(*_split(triples), adapter.bottleneck)
    w2 = last.left @ last.right
    adapter.w1.copy_(w1)
    adapter.b1.copy_(b1)
    adapter.w2.copy_(w2 / scale[:, None])
    adapter.b2.copy_((last.mean_out - w2 @ last.mean_in) / scale)


def _split(triples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Moments, Moments]:
    """What the regressions are fitted on, and what is held out."""
    fitted, held_out = Moments(), Moments()
    for i, triple in enumerate(triples):
        (held_out if i % HELD_OUT == 1 else fitted).add(*triple)
    return fitted, held_out
