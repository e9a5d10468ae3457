"""Descriptions of sublayers, kept from call to call."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..ops.transforms import tracing
from .watch import Watch, same_tensors

Description = TypeVar("Description", bound=tuple)


class Described(Generic[Description]):
    """What a sublayer consists of, kept while nothing that was looked at has changed.

    Threads may call it at once: what is kept is replaced whole. Copies and pickles start empty.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: tuple[Description, Watch, weakref.ref[nn.Module], Any] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    @staticmethod
    def describe(layer: nn.Module) -> Any:
        """What ``layer`` consists of; traceable by ``torch.compile``."""
        raise NotImplementedError

    @staticmethod
    def watched(layer: nn.Module) -> Watch:
        """Everything that :meth:`describe` looks at."""
        raise NotImplementedError

    @staticmethod
    def memory(layer: nn.Module) -> tuple[Any, ...] | None:
        """Of a description that holds views: :func:`memory_of` of what they are views of."""
        return None

    def of(self, layer: nn.Module) -> Description:
        """What ``layer``, always the same one, consists of now."""
        if torch.compiler.is_compiling() or tracing():  # a trace holds what is read on the way
            return self.describe(layer)
        kept = self._kept
        # A replica of DataParallel shares this object with the original.
        if (
            kept is None
            or kept[2]() is not layer
            or not kept[1].holds()
            or (kept[3] is not None and kept[3] != self.memory(layer))
        ):
            # Watched first: what changes in between is looked at again in the next call.
            watch, memory = self.watched(layer), self.memory(layer)
            kept = self.describe(layer), watch, weakref.ref(layer), memory
            same = same_tensors(kept[0], self.describe(layer)) and memory != ()
            self._kept = kept if same else None
        return kept[0]


def memory_of(weight: Any) -> tuple[Any, ...]:
    """Where views of ``weight`` lie; empty where they are part of an autograd graph, so that they
    cannot be kept."""
    if not isinstance(weight, Tensor) or (weight.requires_grad and torch.is_grad_enabled()):
        return ()
    return weight.data_ptr(), weight.dtype, weight.shape, torch.is_inference_mode_enabled()
