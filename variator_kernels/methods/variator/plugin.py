"""Plugins: merge and adapter around a sublayer, or a merge in front of keys and values."""

from __future__ import annotations

import torch
from torch import nn

from ...ops.arguments import MergeWeights
from ...ops.feed_forward import PluginWeights
from .adapter_decompress import AdapterDecompress
from .group_merge import GroupMerge
from .prepared import Prepared


class Plugin(nn.Module):
    """One plugin around a sublayer: ``merge`` (:class:`GroupMerge`) and ``adapter``
    (:class:`AdapterDecompress`).

    Args:
        hidden_size, ratio, bottleneck, activation: d, k, r and φ, as there.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        ratio: int,
        bottleneck: int = 64,
        activation: str = "tanh",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.merge = GroupMerge(hidden_size, ratio, device=device, dtype=dtype)
        self.adapter = AdapterDecompress(
            hidden_size, ratio, bottleneck, activation, device=device, dtype=dtype
        )
        self.prepared = Prepared()

    def weights(self) -> PluginWeights:
        """The parameters as the ops take them."""
        merge, adapter = self.merge, self.adapter
        return PluginWeights(
            merge.weight,
            merge.bias,
            adapter.w1,
            adapter.b1,
            adapter.w2,
            adapter.b2,
            adapter.activation,
        )

    def extra_repr(self) -> str:
        return f"ratio={self.merge.ratio}"


class KeyValuePlugin(nn.Module):
    """One plugin in front of an attention's keys and values: ``merge`` (:class:`GroupMerge`).

    Args:
        hidden_size, ratio: d and k, as there.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        ratio: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.merge = GroupMerge(hidden_size, ratio, device=device, dtype=dtype)
        self.prepared = Prepared()

    def weights(self) -> MergeWeights:
        """The parameters as the ops take them."""
        return MergeWeights(self.merge.weight, self.merge.bias)

    def extra_repr(self) -> str:
        return f"ratio={self.merge.ratio}"
