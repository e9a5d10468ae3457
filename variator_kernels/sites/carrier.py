"""A module on the way from the encoder to its blocks, asked what it got that sublayers need."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..runtime.state import State
from .encoder import argument


class Carrier(nn.Module):
    """Notes some arguments in the context of the forward that runs."""

    variator_state: State
    variator_positions: dict[str, int]
    """Of arguments of ``forward``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context, positions = self.variator_state.local.context, self.variator_positions
        if context is not None:
            given = ((name, argument(name, positions, args, kwargs)) for name in positions)
            packed = context.packed
            context.carried = {
                name: value if packed is None else packed.pad(value)
                for name, value in given
                if value is not None
            }
        return super().forward(*args, **kwargs)
