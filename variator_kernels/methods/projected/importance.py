"""How much a model's dimensions matter: of its stream, and of each FFN's neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...sites.residual import FFN, HIDDEN, Layout, Sublayer
from . import calibration_data as data
from .calibration_data import Batch

ACTIVATION, WEIGHT, GATED, OUTPUT = "activation", "weight", "gated", "output"
KINDS = (ACTIVATION, WEIGHT, GATED, OUTPUT)


def kind_for(layout: Layout, asked: str | None, fits: bool) -> str:
    """The kind of importance. By default, where the start ``fits`` matrices, what the output loses
    without a neuron, else the gated product where FFNs have one.

    Raises:
        ValueError: it is not known, the model has no gates, or the start fits nothing.
    """
    if asked is None:
        return OUTPUT if fits else GATED if layout.gated else ACTIVATION
    kind = checks.choice(asked, KINDS, "importance")
    if kind == OUTPUT and not fits:
        raise ValueError(
            f"importance must be one of {', '.join(map(repr, KINDS[:-1]))} for start 'select', "
            f"where no other neuron takes over, got {OUTPUT!r}"
        )
    if kind == GATED and not layout.gated:
        raise ValueError(
            f"importance must be {ACTIVATION!r} or {WEIGHT!r} for a model without gated FFNs, got "
            f"{GATED!r}"
        )
    return kind


class Importance:
    """``hidden [d]`` and ``ffn``: ``[f]`` for each FFN, by the name of its last layer; float64."""

    def __init__(self, hidden: Tensor | None, ffn: dict[str, Tensor]) -> None:
        self.hidden, self.ffn = hidden, ffn

    def kept_hidden(self, size: int) -> Tensor:
        assert self.hidden is not None
        return _largest(self.hidden, size)

    def kept_ffn(self, part: Sublayer, size: int) -> Tensor:
        return _largest(self.ffn[part.writes], size)


def _largest(scores: Tensor, size: int) -> Tensor:
    """The indices of the ``size`` largest, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:size].sort().values


def measured(model: Any, layout: Layout, kind: str, batches: list[Batch]) -> Importance:
    """Of a model in evaluation; ``batches`` are not read for weights."""
    if kind == WEIGHT:
        return _by_weight(model, layout)
    return _by_activation(model, layout, kind, batches)


def _by_weight(model: nn.Module, layout: Layout) -> Importance:
    """L2 norms of all weights along a dimension."""
    weights = dict(model.named_parameters(remove_duplicate=False))

    def norms(names: list[str], along: str) -> Tensor:
        total: Any = 0.0
        for name in names:
            roles = layout.roles[name]
            axes = [i for i, role in enumerate(roles) if role != along]
            total = total + weights[name].detach().double().square().sum(axes)
        return total.sqrt()  # type: ignore[no-any-return]

    both = [name for name, roles in layout.roles.items() if len(roles) == 2]
    hidden = None
    if layout.residual is not None:
        hidden = norms([name for name in both if HIDDEN in layout.roles[name]], HIDDEN)
    ffn = {
        part.writes: norms([f"{name}.weight" for name in (*part.reads, part.writes)], FFN)
        for part in layout.sublayers
        if part.inner
    }
    return Importance(hidden, ffn)


def _by_activation(model: Any, layout: Layout, kind: str, batches: list[Batch]) -> Importance:
    """Mean absolute values, over all tokens, of what norms give (summed over norms); and of what an
    FFN's first layer gives, or of what its last one reads, the product of both halves."""
    sums: dict[str, Tensor] = {}
    forwards = data.Forwards(model, layout)

    def add(name: str, value: Tensor) -> None:
        found = data.tokens(value, forwards.mask).abs()
        sums[name] = sums.get(name, 0.0) + found.sum(0)  # type: ignore[operator]

    def outputs(name: str) -> Callable[..., None]:
        return lambda module, args, out: add(name, out)

    def inputs(name: str) -> Callable[..., None]:
        return lambda module, args: add(name, args[0])

    hooks = []
    for stack in layout.stacks:
        norms = {part.norm for block in stack.blocks for part in block.sublayers}
        for name in sorted(norms | {stack.norm}) if layout.residual is not None else ():
            hooks.append(model.get_submodule(name).register_forward_hook(outputs(HIDDEN)))
        for part in (part for block in stack.blocks for part in block.sublayers if part.inner):
            if kind == GATED:
                last = model.get_submodule(part.writes)
                hooks.append(last.register_forward_pre_hook(inputs(part.writes)))
            else:
                first = model.get_submodule(part.reads[0])
                hooks.append(first.register_forward_hook(outputs(part.writes)))
    forwards.run(batches, hooks)
    if not all(bool(torch.isfinite(score).all()) for score in sums.values()):
        raise FloatingPointError("the model's activations on batches are not finite")
    return Importance(sums.pop(HIDDEN, None), sums)
