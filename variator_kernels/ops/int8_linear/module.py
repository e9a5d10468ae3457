"""``nn.Linear`` in int8, for layers of a model that are no part of a compressed sublayer's op."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import here, op


class Linear(nn.Linear):
    """Its products run in int8 where :func:`here` says so, else as they did."""

    def forward(self, input: Tensor) -> Tensor:
        runs = here("int8", self.training) is not None and input.is_cpu
        # Somebody may have quantised or sharded the weight since.
        if not runs or is_traceable_wrapper_subclass(self.weight):
            return super().forward(input)
        return op.linear(input, self.weight, self.bias)


PLAIN = (nn.Linear, Linear)
"""The classes of layers that are no more than a weight and a bias."""
