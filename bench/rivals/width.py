"""Narrower FFNs by hard pruning: neurons that matter least are removed.

A neuron matters by the mean absolute value of its activation times the norm of its column in the
last matrix: how far its removal moves the FFN's output. After Wanda's (Sun et al. 2024,
arXiv 2306.11695), for a whole column in place of one weight, and with the mean absolute value in
place of the root of the mean square.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def prune(model: Any, share: float, batches: Iterable[Mapping[str, Tensor]]) -> Any:
    """``model`` itself with ``share`` of each FFN's neurons."""
    layers = model.base_model.encoder.layer
    keep = max(1, round(share * model.config.intermediate_size))
    scores = activations(model, [layer.output.dense for layer in layers], batches)
    for layer, score in zip(layers, scores, strict=True):
        first, last = layer.intermediate.dense, layer.output.dense
        kept = (score * last.weight.norm(dim=0)).topk(keep).indices.sort().values
        layer.intermediate.dense = _linear(first.weight[kept], first.bias[kept])
        layer.output.dense = _linear(last.weight[:, kept], last.bias)
    model.config.intermediate_size = keep
    return model


def activations(model: Any, readers: list[Any], batches: Iterable[Any]) -> list[Tensor]:
    """The mean absolute input of each of ``readers``, over real tokens."""
    sums: list[Any] = [0.0] * len(readers)
    real: Any = None

    def hook(place: int) -> Any:
        def add(_: Any, given: tuple[Tensor, ...]) -> None:
            sums[place] = sums[place] + given[0][real].abs().sum(0)

        return add

    handles = [m.register_forward_pre_hook(hook(i)) for i, m in enumerate(readers)]
    for batch in batches:
        real = batch["attention_mask"].bool()
        model(**batch)
    for handle in handles:
        handle.remove()
    return sums


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return made
