"""Making groups: once for an input and a ratio, in the form that a backend reads."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from .arguments import require
from .cpu_arguments import address
from .groups import (
    NOTHING_KEPT,
    Groups,
    Keep,
    first_real,
    masked_lists,
    max_groups,
    plain_lists,
    varlen_lists,
)
from .kept_groups import kept_lists, rows_of_batch, rows_of_sequences
from .library import LIBRARY, define
from .transforms import exporting, graphing, is_plain, transformed


def make_groups(
    x: Tensor,
    ratio: int,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "reference",
    inner: bool = False,
    keep: Keep = NOTHING_KEPT,
) -> Groups:
    """The groups of ``x [B, n, ...]`` or varlen ``[T, ...]``, as ``backend`` (resolved) reads them.

    No host synchronisation on a GPU. ``mask``, ``cu_seqlens``, ``keep`` are as in the public ops,
    checked.
    ``inner``: no result has their number as a size. Then an exported program has an empty group
    more in each row: the number is never 1, a size on which exporters specialise.
    """
    on_gpu = backend in ("triton", "cuda")
    spare = 1 if inner and exporting() else 0
    mask = _as_bool(mask)
    if not on_gpu and x.is_cpu and graphing() and not transformed() and extension.built():
        return _node(x, ratio, mask, cu_seqlens, keep)
    if not keep.nothing:
        keep = keep._replace(mask=_as_bool(keep.mask))
        offsets = None if cu_seqlens is None else cu_seqlens.long()
        given = [t for t in (x, mask, offsets, keep.mask) if t is not None]
        if backend == "cpu" and all(is_plain(t) and t.is_cpu for t in given):
            return _kept_by_call(x, ratio, mask, offsets, keep)
        return _with_kept(x, ratio, mask, offsets, keep, on_gpu, spare)
    if cu_seqlens is not None:
        start, span, owned = varlen_lists(x.shape[0], cu_seqlens.long(), ratio)
        if on_gpu:
            return Groups(start, span, owned, None, None, ratio, "listed")
        return Groups(start[:-1], span[:-1], None, None, None, ratio, "listed")
    if mask is None:
        if on_gpu:
            return Groups(None, None, None, None, None, ratio, "plain")
        start, span = _plain(x, ratio, spare)
        return Groups(start, span, None, None, None, ratio, "listed")
    if on_gpu:
        return Groups(first_real(mask), None, None, None, mask, ratio, "masked")
    start, span = _masked(mask, ratio, backend, spare)
    return Groups(start, span, None, None, mask, ratio, "listed")


# A graph holds the lists of groups on the CPU as one op. PyTorch's compiler (2.13, AVX2) made other
# numbers of their arithmetic in 64-bit integers.
define(
    "list_groups(Tensor x, Tensor? mask, Tensor? offsets, Tensor? keep, SymInt count, int ratio,"
    " SymInt first, SymInt last) -> (Tensor, Tensor, Tensor)"
)


def _node(
    x: Tensor, ratio: int, mask: Tensor | None, cu_seqlens: Tensor | None, keep: Keep
) -> Groups:
    keep = keep._replace(mask=_as_bool(keep.mask))
    offsets = None if cu_seqlens is None else cu_seqlens.long()
    count = max_groups(x, ratio, cu_seqlens, keep)
    start, span, kept = torch.ops.variator.list_groups.default(
        x, mask, offsets, keep.mask, count, ratio, keep.first, keep.last
    )
    return Groups(start, span, None, None if keep.nothing else kept, mask, ratio, "listed")


@torch.library.impl(LIBRARY, "list_groups", "CPU")
def _list_groups(
    x: Tensor, mask: Tensor | None, offsets: Tensor | None, keep: Tensor | None, count: int,
    ratio: int, first: int, last: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found = _kept_by_call(x, ratio, mask, offsets, Keep(first, last, keep))
    shape = (count,) if offsets is not None else (x.shape[0], count)
    made = [torch.zeros(shape, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.bool)]
    for some, lists in zip((found.start, found.span, found.kept), made, strict=True):
        assert some is not None
        lists[..., : some.shape[-1]] = some
    return made[0], made[1], made[2]


@torch.library.register_fake("variator::list_groups")
def _fake(
    x: Tensor, mask: Tensor | None, offsets: Tensor | None, keep: Tensor | None, count: int, *_: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (count,) if offsets is not None else (x.shape[0], count)
    start, span = (x.new_empty(shape, dtype=torch.int64) for _ in range(2))
    return start, span, x.new_empty(shape, dtype=torch.bool)


def _as_bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else (mask if mask.dtype == torch.bool else mask != 0).contiguous()


def _kept_by_call(
    x: Tensor, ratio: int, mask: Tensor | None, cu_seqlens: Tensor | None, keep: Keep
) -> Groups:
    """As many groups as there are: in the row that has most, in all of varlen input."""
    varlen = cu_seqlens is not None
    for tokens, name in ((mask, "mask"), (keep.mask, "keep")):
        expected = x.shape[: 1 if varlen else 2]
        require(tokens is None or tokens.shape == expected, f"{name}'s shape")
    rows, n = (len(cu_seqlens) - 1, x.shape[0]) if cu_seqlens is not None else x.shape[:2]
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    lists = extension.load().KeptRows(
        mask=address(mask), keep=address(keep.mask), offsets=address(offsets), rows=rows, n=n,
        k=ratio, first=keep.first, last=keep.last,
    )  # fmt: skip
    count = lists.count()
    shape = (count,) if varlen else (rows, count)
    start, span = (torch.empty(shape, dtype=torch.int64, device="cpu") for _ in range(2))
    kept = torch.empty(shape, dtype=torch.bool, device="cpu")
    lists.list(count=count, start=start.data_ptr(), span=span.data_ptr(), kept=kept.data_ptr())
    return Groups(start, span, None, kept, mask, ratio, "listed")


def _with_kept(
    x: Tensor, ratio: int, mask: Tensor | None, cu_seqlens: Tensor | None, keep: Keep,
    on_gpu: bool, spare: int,
) -> Groups:  # fmt: skip
    count = max_groups(x, ratio, cu_seqlens, keep) + spare
    if cu_seqlens is not None:
        rows = rows_of_sequences(x.shape[0], cu_seqlens, keep)
    else:
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        rows = rows_of_batch(real, keep)
    if on_gpu:
        # Tokens of no group stand between, before and behind the runs of each row, or of varlen
        # input before the first and behind the last sequence; and there is one group more.
        gaps = 2 if cu_seqlens is not None else 0
        if mask is not None and mask.shape[1] > 0:
            gaps = torch.sym_min(keep.first + keep.last, mask.shape[1]) + 2
        if keep.mask is None:
            count += (gaps * (ratio - 1) + ratio - 1) // ratio
        count = count if cu_seqlens is None else count + 1
    start, span, owned, kept = kept_lists(rows, ratio, count, outside=on_gpu)
    if cu_seqlens is None:
        start = start + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    else:
        start, span, owned, kept = start[0], span[0], owned[0], kept[0]
    return Groups(start, span, owned if on_gpu else None, kept, mask, ratio, "listed")


def _plain(x: Tensor, ratio: int, spare: int) -> tuple[Tensor, Tensor]:
    rows, n = x.shape[:2]
    if not (is_plain(x) and x.device.type == "cpu"):
        return plain_lists(rows, n, ratio, x.device, spare)
    known = _PLAIN.get((rows, n, ratio))
    if known is None:
        with torch.inference_mode(False):
            known = plain_lists(rows, n, ratio, "cpu")
        if type(known[0]) is Tensor:  # a mode may have made something else of them
            while len(_PLAIN) >= _MOST_PLAIN:
                _PLAIN.pop(next(iter(_PLAIN)), None)
            _PLAIN[rows, n, ratio] = known
    return known


_PLAIN: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
"""Lists of full batches: nothing but sizes decides, and nobody writes to them."""
_MOST_PLAIN = 64


def _masked(mask: Tensor, ratio: int, backend: str, spare: int) -> tuple[Tensor, Tensor]:
    """By one call where the CPU kernels are: PyTorch takes a dozen."""
    if backend != "cpu" or not (is_plain(mask) and mask.device.type == "cpu"):
        return masked_lists(mask, ratio, spare)
    rows, n = mask.shape
    lists = torch.empty(2, rows, (n + ratio - 1) // ratio, dtype=torch.int64, device="cpu")
    start, span = lists[0], lists[1]
    extension.load().list_groups(
        mask=mask.data_ptr(), rows=rows, n=n, k=ratio, start=start.data_ptr(), span=span.data_ptr()
    )
    return start, span
