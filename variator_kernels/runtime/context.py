"""The context of one forward: what every sublayer needs to know and none should find out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import checks
from ..ops.groups import NOTHING_KEPT, Groups, Keep
from ..ops.kept_groups import with_rest
from ..ops.make_groups import make_groups
from ..ops.transforms import is_plain
from .level import Level
from .packed import Packed

Made = TypeVar("Made")


class Context:
    """Made when an encoder's forward begins; its sublayers read it until the forward ends.

    ``mask`` is bool ``[B, n]`` or None (no padding), checked; ``level`` has the ratio of each site;
    ``keep`` says which tokens stay whole. ``pads``: the encoder appends padding of its own, of
    which no mask speaks; ``appends``: tokens. Groups are made once for each ratio (and device: a
    model may be spread over several).
    """

    def __init__(
        self,
        mask: Tensor | None,
        level: Level,
        keep: Keep = NOTHING_KEPT,
    ) -> None:
        self.mask = mask
        # Without padding there is less to do. Where values are not at hand, nobody waits for them.
        self.full = mask is None or (is_plain(mask) and mask.is_cpu and bool(mask.all()))
        self.level = level
        self.dense = level.is_dense
        self.keep = keep
        self.pads = False
        self.appends = False
        self.fuses = False
        """Whether dense sublayers run in few passes where they can (``optimize="encoder"``)."""
        self.step = False
        """Whether it is a step of decoding in which FFNs run as they were, and nobody (observer,
        compiler, mode) has a say."""
        self.causal = False
        """Whether it is a decoder's forward: a last group that is not whole stays dense."""
        self.packed: Packed | None = None
        """Of a forward over sequences without padding, whose padded form the mask is of."""
        self.carried: dict[str, Tensor] = {}
        """What a module on the way to the blocks got that sublayers need: places on a page."""
        self.past = 0
        """Tokens of a row that a cache holds from before."""
        self.position_ids: Any = None
        """The encoder's argument; None: tokens count from 0."""
        self._made: dict[Any, tuple[torch.Size, Any]] = {}
        self._groups: dict[tuple[Any, ...], tuple[torch.Size, Groups]] = {}

    def mask_of(self, x: Tensor) -> Tensor | None:
        """The mask of ``x [B, n, d]``, on its device; None without padding.

        A mask longer than the hidden states speaks of keys from elsewhere too (a prefix): its last
        n columns are the tokens'.

        Raises:
            ValueError: it is shorter, or of another batch.
        """
        if self.mask is None:
            return None
        batch, n = x.shape[:2]
        rows, columns = self.mask.shape
        if (self.pads or self.appends) and columns < n and rows == batch:
            return F.pad(self.mask, (0, n - columns), value=self.appends).to(x.device)
        if rows != batch or columns < n:
            raise ValueError(
                f"attention_mask must have shape [{batch}, {n}] (or more columns, of which the "
                f"last {n} are the tokens'), got {[rows, columns]}"
            )
        return None if self.full else self.mask[:, columns - n :].to(x.device)

    def keep_of(self, x: Tensor) -> Keep:
        """What stays whole of ``x [B, n, d]``; its mask is on x's device.

        Raises:
            ValueError: that mask has another shape.
        """
        mask = self.keep.mask
        if mask is None:
            return self.keep
        if (self.pads or self.appends) and mask.dim() == 2 and mask.shape[1] < x.shape[1]:
            mask = F.pad(mask, (0, x.shape[1] - mask.shape[1]))
        check_kept(mask, x)
        return self.keep._replace(mask=mask.to(x.device))

    def packed_of(self, x: Tensor) -> Packed | None:
        """How the hidden states ``x`` of this forward are packed; None: they are a padded batch.

        ``[T, d]`` are the tokens of the mask alone: the encoder took its padding out by itself.
        """
        if self.packed is not None or x.dim() != 2 or self.mask is None:
            return self.packed
        count = int(self.mask.sum())
        return Packed(self.mask, count) if count == x.shape[0] else None

    def positions(self, x: Tensor) -> Tensor:
        """Of the tokens of ``x [B, n, d]``: ``[B or 1, n]``."""
        if self.position_ids is None:
            return torch.arange(self.past, self.past + x.shape[1], device=x.device)[None]
        return self.position_ids.to(x.device)

    def once(self, key: Any, x: Tensor, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, made for the first sublayer that asks for ``key`` with an ``x [B, n,
        d]`` of this size (compilers would take a size in the key for a constant)."""
        kept = self._made.get(key)
        if kept is None or kept[0] != x.shape[:2]:
            kept = self._made[key] = x.shape[:2], make()
        return kept[1]

    def groups(self, x: Tensor, ratio: int, backend: str) -> Groups:
        """Those of ``x [B, n, d]``, the hidden states of this forward."""
        key = (ratio, x.device, backend)
        kept = self._groups.get(key)
        size = x.shape[:2]
        if kept is None or kept[0] != size:
            mask = self.mask_of(x)
            keep = self.keep_of(x) if ratio > 1 else NOTHING_KEPT
            if self.causal and ratio > 1:
                keep = with_rest(x, ratio, mask, keep)
            made = make_groups(x, ratio, mask=mask, backend=backend, inner=True, keep=keep)
            kept = self._groups[key] = size, made
        return kept[1]


def check_kept(mask: Tensor, x: Tensor) -> None:
    """The mask of kept tokens is one of ``x [B, n, ...]``."""
    if tuple(mask.shape) != tuple(x.shape[:2]):
        raise ValueError(
            f"the mask of kept tokens (of vk.keep, or made of input_ids) must have shape "
            f"{list(x.shape[:2])}, as the encoder's tokens, got {list(mask.shape)}"
        )


def check_past(mask: Tensor | None, shown: Tensor | None, columns: int) -> None:
    """A decoder's ``mask`` hides of the ``columns`` tokens of a cache what it hid when they came:
    bool ``shown [B, columns]``; None: nothing.

    Raises:
        ValueError: it does not.
    """
    if columns == 0 or (mask is None and shown is None):
        return
    now = None if mask is None else mask[:, :columns]
    first = next(t for t in (now, shown) if t is not None)
    now, then = (torch.ones_like(first) if t is None else t.to(first.device) for t in (now, shown))
    if not torch.equal(now, then):
        raise ValueError(
            "attention_mask must show the tokens of past_key_values that it showed when they came "
            f"(merged keys stand for several), {then.sum(1).tolist()} in each row, got others, "
            f"{now.sum(1).tolist()}"
        )


def is_token_mask(mask: Any) -> bool:
    """Whether :func:`token_mask` takes it, as far as shape and dtype tell; None too."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point()


def token_mask(mask: Any) -> Tensor | None:
    """An encoder's ``attention_mask`` argument as bool ``[B, n]``; None if there is none.

    Raises:
        ValueError: it is not two-dimensional, or additive.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "attention_mask must have shape [batch, length] at a ratio above 1 (it tells the "
            f"groups where a row's tokens are), got {got}"
        )
    checks.mask_values(mask, "attention_mask")
    return mask != 0
