"""What training a projected model takes: parameters, memory, and multiply-adds of building W_C."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .composition import Composition, composed, composition_of
from .groups import additions, projections

WARNED = 0.2
"""The part of a step's multiply-adds from which building W_C is called too much."""


class Cost(NamedTuple):
    trainable: int
    """Parameters that get gradients."""
    small: int
    """Parameters of the merged model."""
    frozen_bytes: int
    trained_bytes: int
    """Of trainable parameters, their gradients and two moments each."""
    built_bytes: int
    """Of W_C and the gradient that it collects."""
    teacher_bytes: int
    """Of what the teacher holds besides the frozen weights."""
    building: float
    """Multiply-adds a step: W_C, and its gradient through the projections."""
    step: float
    """Multiply-adds a step of everything else: three products a matrix and token, and one of each
    of the teacher's."""

    @property
    def share(self) -> float:
        return self.building / max(self.building + self.step, 1.0)

    def __str__(self) -> str:
        return (
            f"{self.trainable:,} parameters are trained, {self.trainable / self.small:.1f} times "
            f"the {self.small:,} of the small model; they, their gradients and Adam's moments take "
            f"{_mib(self.trained_bytes)}, built weights and their gradients "
            f"{_mib(self.built_bytes)}, frozen weights {_mib(self.frozen_bytes)}"
            f"{f' and {_mib(self.teacher_bytes)} of the teacher' if self.teacher_bytes else ''}; "
            f"building weights is {100 * self.share:.1f} % of a step's multiply-adds"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of memory that is held once, however many of ``tensors`` lie in it."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors}.values())  # fmt: skip


def counted(small: nn.Module, tokens: float, teacher: nn.Module | None = None) -> Cost:
    """``tokens``: of one optimiser step, over all its batches and one device."""
    trained = [p for p in small.parameters() if p.requires_grad]
    parts = [composition_of(module) for _, module in composed(small)]
    known = {id(p) for p in (*projections(small), *additions(small))}
    rest = sum(p.numel() for p in small.parameters() if id(p) not in known)
    merged = rest + sum(a.numel() for a in additions(small))
    memory = sum(4 * p.numel() * p.element_size() for p in trained)
    built = sum(2 * a.numel() * a.element_size() for a in additions(small))
    weights = [part.frozen for part in parts]
    frozen = _bytes(weights)
    building = sum(map(_building, parts, additions(small)))
    step = 3.0 * tokens * _read(small)
    besides = 0
    if teacher is not None:
        step += tokens * _read(teacher)
        besides = _bytes([*weights, *teacher.parameters()]) - frozen
    count = sum(p.numel() for p in trained)
    return Cost(count, merged, frozen, memory, built, besides, building, step)


def _building(part: Composition, addition: Any) -> float:
    (out, inside), (small_out, small_in) = part.frozen.shape, addition.shape
    total = 0.0
    both = part.p_in is not None and part.p_out is not None
    if both:
        left = small_out * inside * (out + small_in)
        right = out * small_in * (inside + small_out)
        total += min(left, right)
    elif part.p_in is not None or part.p_out is not None:
        total += small_out * small_in * (inside if part.p_in is not None else out)
    if part.p_out is not None:  # G (W P_in)ᵀ
        total += out * small_in * (small_out + (inside if both else 0))
    if part.p_in is not None:  # (P_out W)ᵀ G
        total += inside * small_out * (small_in + (out if both else 0))
    return total


def _read(model: nn.Module) -> int:
    """Elements of linear layers' weights: what a token is multiplied with."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
