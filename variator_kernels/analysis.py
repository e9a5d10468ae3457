"""Which FFN neurons the merged vectors switch on, against those of the tokens they stand for.

The questions of the paper's figure 5 (share of active neurons against k) and table 5 (overlap of a
merged vector's active neurons with the intersection and the union of its tokens').
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from functools import reduce
from operator import and_, or_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.feed_forward import FeedForward, normalize
from .ops.group_merge.reference import group_merge
from .ops.groups import Groups, slots
from .runtime.levels import use_ratio
from .runtime.state import observe
from .sites.feed_forward import describe
from .sites.in_place import patched


@dataclass(frozen=True)
class Activity:
    """Counts in one FFN, or in several of the same inner size added up.

    A neuron is one of the FFN's f inner units; it is active for a vector if the input of its
    activation function is above the threshold. For one group, C are the neurons active for the
    merged vector, I those active for every token of the group, U those active for any.

    The merged vector is a weighted mean of the tokens and what comes before the activation is
    affine, so I ⊆ C ⊆ U whatever the plugin (up to rounding at the threshold): |C ∩ I| is |I| and
    |C ∩ U| is |C|. How much of C is I, and how much of U is C, is what there is to learn.
    """

    neurons: int
    """Of one FFN: f."""
    tokens: int = 0
    """Real tokens."""
    groups: int = 0
    """Groups of k real tokens; shorter ones, those with a hole and kept tokens are left out."""
    active: int = 0
    """Active neurons, over all tokens."""
    merged: int = 0
    """|C|, over all groups; and so on."""
    intersection: int = 0
    union: int = 0
    merged_in_intersection: int = 0
    """|C ∩ I|"""
    merged_in_union: int = 0
    """|C ∩ U|"""

    def __add__(self, other: Activity) -> Activity:
        if self.neurons != other.neurons:
            raise ValueError(
                f"other must have as many neurons, {self.neurons}, got {other.neurons}"
            )
        counts = zip(astuple(self)[1:], astuple(other)[1:], strict=True)
        return Activity(self.neurons, *map(sum, counts))

    def shares(self) -> dict[str, float]:
        """Ratios of the counts; NaN where there is nothing to divide by.

        ``token``, ``merged``, ``intersection``, ``union``: the share of the FFN's neurons that is
        active for a token, for a merged vector, for every token of a group, for any token of it.

        ``merged_in_intersection`` is |C ∩ I| / |C|: of what the merged vector uses, the share that
        every token uses. ``union_kept`` is |C ∩ U| / |U|: of what any token uses, the share that
        the merged vector uses too. ``intersection_kept`` |C ∩ I| / |I| and ``merged_in_union``
        |C ∩ U| / |C| are 1, and a check of the counts.
        """
        of_tokens, of_groups = self.tokens * self.neurons, self.groups * self.neurons
        parts = {
            "token": (self.active, of_tokens),
            "merged": (self.merged, of_groups),
            "intersection": (self.intersection, of_groups),
            "union": (self.union, of_groups),
            "merged_in_intersection": (self.merged_in_intersection, self.merged),
            "union_kept": (self.merged_in_union, self.union),
            "intersection_kept": (self.merged_in_intersection, self.intersection),
            "merged_in_union": (self.merged_in_union, self.merged),
        }
        return {name: part / whole if whole else math.nan for name, (part, whole) in parts.items()}


@torch.no_grad()
def neurons(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    ratio: int = 4,
    threshold: float = 0.0,
) -> list[Activity]:
    """The active neurons of every encoder FFN of a patched model running at one ratio.

    Tokens and merged vectors are those that the FFN of this model meets: below it the model is
    compressed already. Only counts are kept from batch to batch.

    Args:
        model: patched, in eval mode; its plugins as they are, trained or not.
        batches: arguments of the encoder, such as ``input_ids`` and ``attention_mask``, on the
            model's device. Padding does not count.
        ratio: k. At 1 each token is its own group.
        threshold: a neuron is active above it. At 0 that is an output above 0 for ReLU, GELU and
            SiLU alike, since these have the sign of their input. Of a gated FFN the product under
            the activation is looked at.

    Returns:
        One :class:`Activity` a layer.

    Raises:
        ValueError: the model is not patched or in training mode, there are no plugins for
        ``ratio``, ``threshold`` is not finite, ``batches`` is empty, or an FFN is more than its
        weights (replaced or hooked linear layers).
    """
    found, state = patched(model)
    if model.training:
        raise ValueError("model must be in eval mode: dropout would switch neurons off")
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold}")
    place = {layer: i for i, layer in enumerate(found.layers)}
    counts: list[Activity | None] = [None] * len(place)

    def see(layer: nn.Module, x: Tensor, mask: Tensor | None, k: int) -> None:
        i = place[layer]
        ffn = describe(layer)
        if ffn.module is not None:
            raise ValueError(f"model's FFN {i} is more than its weights: its neurons are not seen")
        new = _activity(layer, ffn, x, mask, state.groups(x, k), threshold)
        before = counts[i]
        counts[i] = new if before is None else before + new

    with use_ratio(model, ratio), observe(state, see):
        for batch in batches:
            found.encoder(**batch)
    seen = [activity for activity in counts if activity is not None]
    if not seen:
        raise ValueError("batches must hold at least one batch, got none")
    return seen


def _activity(
    layer: Any, ffn: FeedForward, x: Tensor, mask: Tensor | None, groups: Groups, threshold: float
) -> Activity:
    if not ffn.post_norm:
        x = normalize(x, ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)
    index, exists = slots(groups)
    exists = exists.flatten(0, 1)
    active = _is_active(x.flatten(0, 1), ffn, threshold)
    whole = exists.all(-1)
    slotted = [active[slot] for slot in index.flatten(0, 1)[whole].unbind(-1)]  # k of [groups, f]
    every, some = reduce(and_, slotted), reduce(or_, slotted)
    merged = every
    if groups.ratio > 1:
        merge = layer.plugins[str(groups.ratio)].merge
        vectors = group_merge(x, merge.weight, merge.bias, groups)
        merged = _is_active(vectors.flatten(0, 1)[whole], ffn, threshold)
    real = active if mask is None else active[mask.flatten() != 0]
    sums = (real, merged, every, some, merged & every, merged & some)
    totals = (int(found.count_nonzero()) for found in sums)
    return Activity(ffn.w_in.shape[0], len(real), len(every), *totals)


def _is_active(h: Tensor, ffn: FeedForward, threshold: float) -> Tensor:
    return F.linear(h.to(ffn.w_in.dtype), ffn.w_in, ffn.b_in) > threshold
