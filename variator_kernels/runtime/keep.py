"""Tokens that stay whole in one context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ops.checks import readable
from .find_states import found
from .state import kept_masks


@contextmanager
def keep(model: nn.Module, mask: Tensor) -> Iterator[nn.Module]:
    """Keep the tokens of ``mask`` whole in the forwards inside the ``with`` block.

    They come on top of what the model keeps by itself (``keep_first``, ``keep_last`` and ``keep``
    of :func:`patch`). The block holds in this thread or asyncio task alone, as :func:`use_ratio`
    does, with the same limit for compiled models. In a nested block the inner mask *replaces* the
    outer one: it may belong to another batch; write ``outer | inner`` for both.

    Args:
        model: patched, or a module that holds patched models.
        mask: ``[B, n]`` as the encoder's hidden states, bool or of 0 and 1, nonzero for a token
            that stays whole; padding does not count. Its shape is looked at by the first forward
            at a ratio above 1; on a GPU its values are not looked at. Writing to it inside the
            block changes nothing.

    Raises:
        TypeError: ``mask`` is not a tensor. ValueError: the model is not patched, or ``mask`` has
        another number of dimensions or other values. In the forward: its shape is not that of the
        hidden states, or the forward is exported or traced (the program would hold this mask).
    """
    chosen = dict.fromkeys(found(model), _checked(mask))
    outer = kept_masks.get()
    kept_masks.set({**outer, **chosen})
    for state in chosen:
        state.local.kept = chosen[state]
    try:
        yield model
    finally:
        kept_masks.set(outer)
        for state in chosen:
            state.local.kept = outer.get(state)


def _checked(mask: Tensor) -> Tensor:
    """As bool, a copy."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dim() != 2:
        raise ValueError(f"mask must have shape [batch, length], got {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask.clone()
    if mask.is_complex():
        raise ValueError(f"mask must be bool or hold 0 and 1, got {mask.dtype}")
    if readable(mask) and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask must be bool or hold 0 and 1, got other values")
    return mask != 0
