"""Input without padding: sequences behind one another, and the padded batch that means the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Which tokens of a padded batch the packed ones are, one after another."""

    mask: Tensor
    """bool ``[B, n]``."""
    tokens: int
    """T."""

    def pad(self, x: Tensor) -> Tensor:
        """``[1, T, ...]`` or ``[T, ...]`` to ``[B, n, ...]``; 0 where there is no token."""
        rows = x.flatten(0, 1) if tuple(x.shape[:2]) == (1, self.tokens) else x
        mask = self.mask.to(x.device)
        return rows.new_zeros(*mask.shape, *rows.shape[1:]).masked_scatter(
            mask.view(*mask.shape, *(1,) * (rows.dim() - 1)), rows
        )

    def unpad(self, y: Tensor, like: Tensor) -> Tensor:
        """Back to the shape of ``like``."""
        return y[self.mask.to(y.device)].view(like.shape)


def check_one_sequence(places: Any, attention: str) -> None:
    """That an encoder's ``position_ids`` do not cut its one row into sequences: transformers' flash
    attention reads them so where there is neither a mask nor ``cu_seq_lens_q``.

    Raises:
        ValueError: they do.
    """
    if "flash" not in attention or not isinstance(places, Tensor):
        return
    if places.dim() == 2 and len(places) == 1 and bool((places[0].diff() != 1).any()):
        raise ValueError(
            "position_ids must rise by one at a ratio above 1, got some that start anew, which "
            "flash attention takes for packed sequences: give cu_seq_lens_q besides"
        )


def packed_sequences(offsets: Any, tokens: Tensor | None, mask: Any) -> Packed | None:
    """Those of an encoder's argument ``cu_seq_lens_q``; None where there is none.

    Raises:
        ValueError: it does not cut the ``tokens [1, T, ...]`` into sequences, or there is an
        attention ``mask`` besides.
    """
    if offsets is None:
        return None
    if mask is not None:
        raise ValueError(
            "attention_mask must be None with cu_seq_lens_q: packed sequences have no padding"
        )
    if not isinstance(offsets, Tensor) or offsets.dim() != 1 or offsets.is_floating_point():
        got = list(offsets.shape) if isinstance(offsets, Tensor) else type(offsets).__name__
        raise ValueError(f"cu_seq_lens_q must be integers [sequences + 1], got {got}")
    lengths = offsets.long().diff()
    count = None if tokens is None else tuple(tokens.shape[:2])
    ends = (int(offsets[0]), int(offsets[-1])) if len(offsets) else ()
    if not ends or ends[0] or bool((lengths < 0).any()) or count not in (None, (1, ends[1])):
        raise ValueError(
            "cu_seq_lens_q must rise from 0 to the number of tokens of one row (at a ratio above "
            f"1), got {offsets.tolist()} for {None if count is None else list(count)}"
        )
    longest = int(lengths.max()) if len(lengths) else 0
    place = torch.arange(longest, device=offsets.device)
    return Packed(place < lengths[:, None], ends[1])
