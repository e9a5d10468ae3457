"""Constants that a family derives from its hidden size: the factor of embeddings, and of the head's
input. They are measured, in the original and in the small model, and folded into weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...sites.residual import Layout

TOLERANCE = 1e-2
"""How far what is measured may be from a multiple (bf16 rounds each value)."""


class Constants(NamedTuple):
    embedding: float
    """Of the first block's input over the embedding."""
    head: float
    """Of the head's input over the last norm's output."""


@torch.no_grad()
def measured(model: Any, layout: Layout) -> Constants:
    """Of a model in evaluation.

    Raises:
        ValueError: something else than a factor stands there.
    """
    seen: dict[str, Tensor] = {}

    def output(name: str) -> Any:
        return lambda module, args, out: seen.__setitem__(name, out)

    def into(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            seen[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    stack = layout.stacks[-1]
    first = model.get_submodule(stack.blocks[0].name)
    handles = [
        first.register_forward_pre_hook(into("stream"), with_kwargs=True),
        model.get_submodule(stack.norm).register_forward_hook(output("last")),
    ]
    if layout.head:
        head = model.get_submodule(layout.head)
        handles.append(head.register_forward_pre_hook(into("head"), with_kwargs=True))
    weight = model.get_submodule(layout.embeddings[0]).weight
    ids = torch.arange(min(16, weight.shape[0]), device=weight.device)[None]
    inputs = {"input_ids": ids}
    if len(layout.stacks) > 1:
        inputs["decoder_input_ids"] = ids
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    embedding = _factor(seen["stream"], weight[ids], "the first block's input", "its embeddings")
    if not layout.head:
        return Constants(embedding, 1.0)
    last = seen["last"][:, -seen["head"].shape[1] :]
    return Constants(embedding, _factor(seen["head"], last, "the head's input", "the last norm"))


def _factor(value: Tensor, base: Tensor, what: str, of: str) -> float:
    value, base = value.double(), base.double()
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(f"the model's hidden states are not finite ({what})")
    factor = float((value * base).sum() / base.square().sum())
    if not torch.allclose(value, factor * base, atol=TOLERANCE * float(value.abs().max())):
        raise ValueError(f"model must make {what} of {of} by a factor alone, it does not")
    return factor
