"""GroupMerge: the merge's parameters W_c and b_c."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import checks, functional
from ...backends import BACKENDS


class GroupMerge(nn.Module):
    """Merge each group of ``ratio`` neighbouring vectors into one (paper section 3.2).

    Parameters: ``weight [k, k*d]`` and ``bias [k]``, zero at first: a mean.

    Args:
        hidden_size: d.
        ratio: k, at least 2.
        backend: as in :func:`functional.group_merge`.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        ratio: int,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = checks.ratio(hidden_size, "hidden_size")
        self.ratio = checks.ratio(ratio, least=2)
        self.backend = checks.choice(backend, ("auto", *BACKENDS), "backend")
        k, d = self.ratio, self.hidden_size
        self.weight = nn.Parameter(torch.empty(k, k * d, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(k, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """``x [B, n, d]`` to ``[B, ceil(n/k), d]``; packed input as in ``functional``."""
        return functional.group_merge(
            x, self.weight, self.bias, mask=mask, cu_seqlens=cu_seqlens, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, ratio={self.ratio}"
