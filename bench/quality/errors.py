"""How far a compressed model's last hidden states are from the dense one's."""

from typing import Any

import torch
from torch import Tensor, nn

import variator_kernels as vk

Batches = list[dict[str, Tensor]]


def states(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The last hidden states of real tokens ``[tokens, d]``, as the model stands."""
    encoder: Any = getattr(model, "base_model", model)
    return encoder(**batch).last_hidden_state[batch["attention_mask"].bool()]  # type: ignore[no-any-return]


@torch.no_grad()
def error(model: nn.Module, batches: Batches, exact: list[Tensor] | None, level: Any) -> float:
    """The relative squared error at a level; ``exact``: what :func:`states` gives of each batch, by
    default of the model at ratio 1."""
    squared = total = 0.0
    for place, batch in enumerate(batches):
        with vk.use_ratio(model, 1):
            dense = states(model, batch) if exact is None else exact[place]
        with vk.use_ratio(model, level):
            squared += float((states(model, batch).double() - dense.double()).square().sum())
        total += float(dense.double().square().sum())
    return squared / total
