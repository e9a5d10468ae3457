"""Groups as the CPU kernels read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import extension
from .arguments import require
from .cpu_arguments import address
from .groups import Groups


class Listed(NamedTuple):
    """Groups as the kernels read them; the tensors keep their memory alive."""

    kernel: Any
    """The extension's own ``Groups``."""
    tensors: tuple[Tensor | None, ...]
    covers_all: bool
    """Whether every token lies in a group."""


class _Seen(NamedTuple):
    groups: Groups
    tokens: int
    versions: tuple[int, ...]
    found: Listed


_seen: dict[bool, _Seen] = {}
"""The last lists, compact or not: all layers of a forward share their groups."""


def listed(groups: Groups, tokens: int, *, compact: bool = False) -> Listed:
    """Groups of a flat list of ``tokens``; ``compact`` leaves out those without a slot.

    Raises:
        ValueError: a group lies outside of the list, or on another: the kernels would read memory
            of others, or write a token twice.
    """
    # Of tensors of inference mode nobody knows of writes; groups are their maker's alone.
    given = (t for t in groups[:5] if t is not None)
    versions = tuple(0 if t.is_inference() else t._version for t in given)
    last = _seen.get(compact)
    if last is not None and last.groups is groups and last[1:3] == (tokens, versions):
        return last.found
    found = _listed(groups, tokens, compact)
    _seen[compact] = _Seen(groups, tokens, versions, found)
    return found


def _listed(groups: Groups, tokens: int, compact: bool) -> Listed:
    start, span, mask, kept = groups.start, groups.span, groups.mask, groups.kept
    require(groups.form == "listed", f"the CPU kernels read listed groups, got {groups.form!r}")
    assert start is not None and span is not None
    require(groups.owned is None, "groups with owned tokens are a GPU's")
    require(mask is None or mask.numel() == tokens, "the mask's size")
    require(mask is None or mask.dtype == torch.bool, "the mask must be bool")
    require(kept is None or kept.dtype == torch.bool, "kept must be bool")
    require(all(t is None or t.is_cpu for t in (start, span, mask, kept)), "groups are on the CPU")
    start, span = start.contiguous(), span.contiguous()
    mask, kept = (None if t is None else t.contiguous() for t in (mask, kept))
    require(start.dtype == span.dtype == torch.int64, "start and span must be int64")
    require(start.numel() == span.numel(), "start and span are of one size")
    require(kept is None or kept.numel() == start.numel(), "start and kept are of one size")
    kernel = _kernel((start, span, mask, kept), start.numel(), groups.ratio)
    held = kernel.held(tokens)
    require(held >= 0, "groups must lie within the tokens, one after another")
    covers_all = mask is None and held == tokens
    if compact and not covers_all:
        used = torch.empty(2, start.numel(), dtype=torch.int64)
        used_kept = None if kept is None else torch.empty_like(kept)
        count = kernel.compact(
            start=used[0].data_ptr(), span=used[1].data_ptr(), kept=address(used_kept)
        )
        start, span, kept = used[0], used[1], used_kept
        kernel = _kernel((start, span, mask, kept), count, groups.ratio)
    return Listed(kernel, (start, span, mask, kept), covers_all)


def _kernel(lists: tuple[Tensor | None, ...], count: int, k: int) -> Any:
    start, span, mask, kept = map(address, lists)
    return extension.load().Groups(start=start, span=span, mask=mask, kept=kept, count=count, k=k)


def copy_outside(groups: Listed, x: Tensor, y: Tensor) -> None:
    """Copies to flat ``y [tokens, d]`` the rows of ``x`` that no group holds; same dtype."""
    require(x.dtype == y.dtype, f"x is {x.dtype}, y is {y.dtype}")
    if groups.covers_all:
        return
    groups.kernel.copy_outside(
        tokens=x.shape[0],
        x=x.data_ptr(),
        x_stride=x.stride(0),
        y=y.data_ptr(),
        d=x.shape[1],
        element_size=x.element_size(),
    )
