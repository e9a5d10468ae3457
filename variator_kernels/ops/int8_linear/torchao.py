"""torchao's int8 weights, read as they are. By names: nothing imports torchao for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..frozen_linear import is_plain_weight
from .stored import StoredWeight

PACKAGE = "torchao."
FIELDS = ("qdata", "scale", "zero_point", "block_size", "act_quant_kwargs", "act_quant_scale",
          "act_pre_scale")  # fmt: skip
"""What :func:`read` looks at inside of a weight."""


def read(weight: Any) -> StoredWeight | str:
    """A weight ``[out, in]`` in int8 with a scale, or one an output channel, and no zero points;
    else what it is, or ``""`` for a plain one."""
    kind = type(weight)
    if not kind.__module__.startswith(PACKAGE):
        return "" if is_plain_weight(weight) else f"a weight that is a {kind.__name__}"
    name = f"torchao {kind.__name__}"
    if kind.__name__ != "Int8Tensor":
        return name
    parts: list[Any] = [getattr(weight, field, None) for field in FIELDS]
    numbers, scale, zeros, block, dynamic, static, before = parts
    if static is not None or before is not None:
        return f"{name} with constants of its activations"
    if not (is_plain_weight(numbers) and is_plain_weight(scale) and scale.is_contiguous()):
        return f"{name} of other tensors"
    whole = [list(numbers.shape), [1, numbers.shape[-1]]]
    if numbers.dim() != 2 or list(block) not in whole or scale.numel() not in (1, len(numbers)):
        return f"{name} with a scale for each {list(block)} of weights"
    if numbers.dtype != torch.int8 or (zeros is not None and bool(zeros.any())):
        return f"{name} with zero points"
    return StoredWeight(numbers, scale.detach().view(-1), dynamic is not None)


def memory(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """The plain tensors inside of torchao's among ``parameters``, of which packed copies are
    made."""
    for parameter in parameters:
        if type(parameter).__module__.startswith(PACKAGE):
            fields = vars(parameter)
            yield from (fields[name] for name in FIELDS[:2] if isinstance(fields.get(name), Tensor))
