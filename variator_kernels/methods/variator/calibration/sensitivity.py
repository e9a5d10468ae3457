"""How much an error behind a site matters for what the model gives at its end.

One backward pass through the dense model, from a random direction of its output, gives a gradient
``g`` behind every site and token. Its mean outer product says which directions matter there, its
length which tokens do: the next layers read some of them a hundred times as much as others, and a
classifier reads nothing but what its first token has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .inputs import Chunk

Output = Callable[[Mapping[str, Tensor]], Tensor]
"""The model's output for some sequences of encoder arguments, differentiable: ``[B, ...]``."""
TOKENS = 1024
"""Of a backward pass, with padding."""
PLAIN = 0.1
"""What every direction weighs at least, over the mean."""
RANGE = 100.0
"""A token weighs at most this times the mean, and at least the mean over this."""


class Sensitivity(NamedTuple):
    """Of one site."""

    root: Tensor
    """``[d, d]``: errors ``e [.., d]`` count as ``e @ root``."""
    weights: list[Tensor]
    """For each chunk ``[B, n]``, 1 on average."""


def output_of(model: nn.Module, encoder: Any) -> Output:
    """What ``model`` gives: class logits, else the last hidden states.

    These stand for a sentence's embedding too: one vector for all of its tokens tells less, and
    weighing by it ended further from it.
    """
    config = getattr(model, "config", None)
    # Others' classes may take anything.
    known = any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)
    heads = known and model is not encoder and not getattr(config, "is_encoder_decoder", False)

    def output(inputs: Mapping[str, Tensor]) -> Tensor:
        nonlocal heads
        if heads:
            logits = getattr(model(**inputs), "logits", None)
            if isinstance(logits, Tensor) and logits.dim() == 2:
                # What all classes get changes no answer.
                return logits - logits.mean(-1, keepdim=True) if logits.shape[-1] > 1 else logits
            heads = False
        found = encoder(**inputs)
        if isinstance(found, Tensor):
            return found
        return found[0] if isinstance(found, tuple) else found.last_hidden_state

    return output


def sensitivities(
    layers: Sequence[nn.Module],
    output: Output,
    chunks: Sequence[Chunk],
    tokens: Sequence[Sequence[Tensor]],
) -> list[Sensitivity]:
    """For each of ``layers``, in the order in which they run, at the ratio in force (1).

    ``tokens``: of each layer, bool ``[B, n]`` for each chunk: those that errors are made at. Around
    an FFN the ones that stay whole, perhaps the most important of all, do not count.

    Raises:
        RuntimeError: something on the way passes no gradient.
    """
    size = len(layers)
    weights: list[list[list[Tensor]]] = [[[] for _ in chunks] for _ in range(size)]
    outer: list[Any] = [0.0] * size
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), _probed(layers) as probes:
        for j, chunk in enumerate(chunks):
            for rows in _pieces(chunk):
                probes.clear()
                given = output({key: value[rows] for key, value in chunk.inputs.items()})
                used = probes[-size:]  # of the run that made it
                direction = _direction(given, chunk.mask[rows], generator)
                gradients = torch.autograd.grad(given, used, direction, allow_unused=True)
                for i, (g, probe) in enumerate(zip(gradients, used, strict=True)):
                    g = torch.zeros_like(probe) if g is None else g
                    g = torch.where(tokens[i][j][rows][..., None], g.float(), 0)
                    weights[i][j].append(g.square().sum(-1))
                    flat = g.flatten(0, 1)
                    outer[i] = outer[i] + (flat.T @ flat).double()
    return [_of(outer[i], [torch.cat(rows) for rows in weights[i]], tokens[i]) for i in range(size)]


def _direction(given: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Random, and the same for a token wherever the padding is."""
    if given.dim() != 3:  # a row a sequence
        return torch.randn(given.shape, generator=generator).to(given)
    tokens = torch.randn(int(mask.sum()), *given.shape[2:], generator=generator).to(given)
    spread = torch.zeros_like(given)
    spread[mask] = tokens
    return spread


def _of(outer: Tensor, weights: list[Tensor], merged: Sequence[Tensor]) -> Sensitivity:
    d, total = len(outer), float(outer.trace())
    if not total > 0:  # nothing behind reads it
        return Sensitivity(torch.eye(d).to(weights[0]), [torch.ones_like(w) for w in weights])
    values, vectors = torch.linalg.eigh(outer * (d / total))
    root = (vectors * (values.clamp_min(0) + PLAIN).sqrt()).float()
    mean = torch.cat([w[m] for w, m in zip(weights, merged, strict=True)]).mean()
    return Sensitivity(root, [(w / mean).clamp(1 / RANGE, RANGE) for w in weights])


@contextmanager
def _probed(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Zeros that are added to what each run of a layer gives, in the order of the runs."""
    probes: list[Tensor] = []

    def add(layer: nn.Module, args: Any, given: Any) -> Any:
        x = given[0] if isinstance(given, tuple) else given
        probes.append(torch.zeros_like(x, requires_grad=True))
        x = x + probes[-1]
        return (x, *given[1:]) if isinstance(given, tuple) else x

    hooks = [layer.register_forward_hook(add) for layer in dict.fromkeys(layers)]
    try:
        yield probes
    finally:
        for hook in hooks:
            hook.remove()


def _pieces(chunk: Chunk) -> Iterator[slice]:
    rows, n = chunk.mask.shape
    step = max(1, TOKENS // n)
    for i in range(0, rows, step):
        yield slice(i, i + step)
