"""Values of the frozen W, by which another original of the same shapes is told apart.

P and A mean nothing to other weights. One dtype holds the same values always, so these must be
equal; between two, only what rounding leaves can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...sites.base_weights import spread
from .composition import composed, composition_of

VALUES = 8
"""Taken of each W, evenly spaced."""


def sampled(small: nn.Module) -> dict[str, dict[str, Any]]:
    """Dtype and values of each W, by the module's name."""
    return {
        name: {"dtype": str(w.dtype).removeprefix("torch."), "values": spread(w, VALUES).tolist()}
        for name, w in _frozen(small).items()
    }


def check(small: nn.Module, saved: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """That ``small`` projects the original that ``saved`` was sampled of.

    Raises:
        ValueError: it is another one.
    """
    frozen = _frozen(small)
    if frozen.keys() != saved.keys():
        name = min(frozen.keys() ^ saved.keys())
        raise ValueError(f"{where} must project the matrices of this model, not so {name}")
    for name, entry in saved.items():
        ours, theirs = spread(frozen[name], VALUES), entry["values"]
        if not _same(ours, frozen[name].dtype, theirs, getattr(torch, entry["dtype"])):
            raise ValueError(
                f"the original must be the model that {where} was projected from: {name}.weight "
                f"has values {_shown(theirs)} there, got {_shown(ours.tolist())}"
            )


def _frozen(small: nn.Module) -> dict[str, Tensor]:
    return {name: composition_of(module).frozen for name, module in composed(small)}


def _same(ours: Tensor, kept: torch.dtype, values: Sequence[float], stored: torch.dtype) -> bool:
    theirs = torch.tensor(values, dtype=torch.float64)
    if ours.shape != theirs.shape:
        return False
    limits = [] if kept == stored else [torch.finfo(kept), torch.finfo(stored)]
    relative = max((limit.eps for limit in limits), default=0.0)
    smallest = max((limit.eps * limit.smallest_normal for limit in limits), default=0.0)
    return bool(torch.isclose(ours, theirs, relative, smallest, equal_nan=True).all())


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values[:3]) + ", ..."
