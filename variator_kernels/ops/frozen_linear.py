"""What stands in for the class of a plain ``nn.Linear`` whose product runs otherwise."""

from __future__ import annotations

from torch import nn


class FrozenLinear(nn.Linear):
    """A base: weights, keys and everything but the product are ``nn.Linear``'s."""


def is_plain(kind: type) -> bool:
    """Whether layers of a class are no more than a weight and a bias."""
    return kind is nn.Linear or issubclass(kind, FrozenLinear)
