"""What stands in for the class of a plain ``nn.Linear`` whose product runs otherwise."""

from __future__ import annotations

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class FrozenLinear(nn.Linear):
    """A base: weights, keys and everything but the product are ``nn.Linear``'s."""

    def has_plain_weight(self) -> bool:
        """Whether nobody has quantised or sharded the weight since."""
        return not is_traceable_wrapper_subclass(self.weight)


def is_plain(kind: type) -> bool:
    """Whether layers of a class are no more than a weight and a bias."""
    return kind is nn.Linear or issubclass(kind, FrozenLinear)
