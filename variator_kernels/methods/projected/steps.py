"""Optimizer steps count as writes: PyTorch's fused optimizers, and all that write ``p.data``,
change parameters without counting it."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class Reader(Protocol):
    read: list[Tensor]
    """What it keeps a result of, by their counters."""


_ALIVE: weakref.WeakSet[Any] = weakref.WeakSet()


def watch(reader: Reader) -> None:
    """After each optimizer's step, the parameters of it that ``reader`` read count as written."""
    _hook()
    _ALIVE.add(reader)


@functools.cache
def _hook() -> None:
    register_optimizer_step_post_hook(_count)


def _count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # Other models' parameters are left alone: what their graphs saved must stay valid to them.
    read = {id(tensor) for reader in list(_ALIVE) for tensor in reader.read}
    groups = optimizer.param_groups
    written = [p for group in groups for p in group["params"] if id(p) in read]
    torch.autograd.graph.increment_version(written)
