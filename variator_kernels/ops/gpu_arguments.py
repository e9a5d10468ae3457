"""What both GPU backends are told the same way: groups with the sizes of a launch, outputs.

Slots are numbered through: slot ``s = i*k + j`` is the j-th of group i. Every token belongs to
exactly one slot, also padding, so a kernel that walks over all slots writes every row of an output
and nothing needs to be zeroed or copied before. Three forms:

``plain``   ``[B, n, d]`` without a mask: all arithmetic, no tensor.
``masked``  ``start [B]`` is the row position of the first real token. Slots count from there and
            wrap around at the row's end to the left padding.
``listed``  ``start``, ``span``, ``owned`` ``[launched]``: a group's first token, how many slots it
            merges (less those the mask leaves out), and how many it owns. Groups that merge nothing
            own the tokens of no group, which are passed through; groups behind the last real one
            of varlen input wrap around at the end of the list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import (
    AdapterWeights,
    MergeWeights,
    Norm,
    check_decompress,
    check_merge,
    flat,
    require,
)
from .groups import Groups, count_tokens


class GpuGroups(NamedTuple):
    """The groups of one input, as kernels read them."""

    form: str
    start: Tensor | None
    span: Tensor | None
    owned: Tensor | None
    mask: Tensor | None
    """uint8, a byte a token, nonzero for a real one; not where ``plain``."""
    n: int
    """Tokens a row; for varlen input all tokens."""
    per_row: int
    """Groups a row; for varlen input all groups."""
    total: int
    """Groups that have a merged vector."""
    launched: int
    """Groups to walk over: varlen input has one more that may own tokens."""
    ratio: int
    kept: Tensor | None = None
    """uint8 ``[launched]``, nonzero for a group whose token stays whole; ``listed`` only."""

    def adapted(self) -> GpuGroups:
        """As the adapter's gradients see them: kept groups own their tokens, but hold none."""
        if self.kept is None:
            return self
        assert self.span is not None
        return self._replace(span=torch.where(self.kept != 0, 0, self.span), kept=None)

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """In the order of the Triton kernels' arguments; the sizes too."""
        return self.start, self.span, self.owned, self.mask

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.total, self.launched, self.n, self.per_row


def gpu_groups(groups: Groups, x: Tensor) -> GpuGroups:
    """Of ``x [B, n, ...]``, or of varlen ``[T, ...]``."""
    shape, k = groups.shape(x), groups.ratio
    mask, kept = (
        None if t is None else t.contiguous().view(torch.uint8) for t in (groups.mask, groups.kept)
    )
    if groups.form == "listed":
        require(groups.owned is not None, "groups without owned tokens are the CPU's")
        assert groups.start is not None and groups.span is not None and groups.owned is not None
        lists = [t.contiguous() for t in (groups.start, groups.span, groups.owned)]
        start, span, owned = lists
        launched, tokens = start.numel(), count_tokens(x)
        require(all(t.numel() == launched for t in lists), "start, span, owned are of one size")
        require(kept is None or kept.numel() == launched, "start and kept are of one size")
        require(mask is None or mask.numel() == tokens, "the mask's size")
        total = launched - 1 if x.dim() == 2 else launched
        sizes = (tokens, total, total, launched, k)
        return GpuGroups("listed", start, span, owned, mask, *sizes, kept)
    require(kept is None, "groups with kept tokens are listed")
    rows, per_row = shape
    total = rows * per_row
    return GpuGroups(
        groups.form, groups.start, None, None, mask, x.shape[1], per_row, total, total, k
    )


def contiguous(vector: Tensor | None) -> Tensor | None:
    """A vector that may be missing, with unit stride."""
    return None if vector is None else vector.contiguous()


def contiguous_norm(norm: Norm) -> Norm:
    """The norm with vectors of unit stride."""
    return Norm(norm.name, contiguous(norm.weight), contiguous(norm.bias), norm.eps)


def unit_rows(matrix: Tensor) -> Tensor:
    """A matrix whose rows have unit stride; they may lie apart."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


class MergeOutputs(NamedTuple):
    """``merged [.., G, d]``; fp32 ``projected [.., n, r]`` and ``softmax [.., G, k]``, or None
    where a caller wants none."""

    merged: Tensor
    projected: Tensor | None
    softmax: Tensor | None


def merge_outputs(
    x: Tensor, merge: MergeWeights, groups: Groups, norm: Norm
) -> tuple[GpuGroups, Tensor, Tensor, Tensor]:
    """Checks a merge's arguments: its groups, and room for its three outputs."""
    check_merge(x, merge, groups, norm)
    shape = groups.shape(x)
    merged = x.new_empty(*shape, x.shape[-1])
    softmax = x.new_empty(*shape, groups.ratio, dtype=torch.float32)
    projected = x.new_empty(*x.shape[:-1], merge.bottleneck, dtype=torch.float32)
    return gpu_groups(groups, x), merged, projected, softmax


class DecompressInputs(NamedTuple):
    """Flat ``u [groups, d]``, ``projected [tokens, r]`` in fp32, ``residual [tokens, d]``;
    ``poison [groups, k]``, the merge's softmax, carries NaN past the FFN's activation."""

    u: Tensor
    projected: Tensor
    residual: Tensor | None = None
    poison: Tensor | None = None


def decompress_output(
    u: Tensor,
    projected: Tensor,
    adapter: AdapterWeights,
    residual: Tensor | None,
    groups: Groups,
) -> tuple[GpuGroups, Tensor]:
    """Checks a decompress's arguments: its groups, and room for ``y``."""
    check_decompress(u, projected, adapter, groups)
    shape = (*projected.shape[:-1], u.shape[-1])
    require(residual is None or residual.shape == shape, "residual's shape")
    return gpu_groups(groups, projected), u.new_empty(shape)


def flat_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else flat(x)
