"""Attention over merged keys, on a CPU or a GPU: ours beside SDPA with a mask that is ready.

All arms get the same merged keys and values. SDPA's mask is made before the clock runs, as a model
makes it once for all layers: T5's terms ``[1, H, n, G]``, or the logarithm of a group's tokens a
key (none at k = 1). Ours looks T5's terms up inside.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from variator_kernels.functional import distance_bias, grouped_attention

from .. import internals
from ..harness.checks import Outputs, Truth, truth
from . import Arm, Call, Case, Key, models
from .sublayer import usable

TERMS = ("distances", "tokens")
"""T5's relative positions; BERT's merged keys, which count for as many tokens as they are of."""
MODELS = dict(zip(TERMS, ("t5-base", "bert-base"), strict=True))
SDPA, REFERENCE, OURS = "hf-sdpa", "reference", "ours"
ARMS = (SDPA, OURS)
HEADS, HEAD, BUCKETS = 12, 64, 32
"""Of T5-base and BERT-base."""


class Work:
    """Queries, merged keys and values, and what is added to their products."""

    def __init__(
        self, terms: str, dtype: str, batch: int, length: int, k: int, device: str = "cpu",
        backend: str = "auto",
    ) -> None:  # fmt: skip
        """``backend``: of ours."""
        self.terms, self.dtype, self.k, self.size = terms, models.DTYPES[dtype], k, (batch, length)
        self.device, self.backend = device, backend
        source, groups = models.generator(7), -(-length // k)

        def normal(count: int) -> Tensor:
            return torch.randn(batch, count, HEADS, HEAD, generator=source)

        # What T5 lacks of a scale is in its queries.
        queries = normal(length) * (HEAD**-0.5 if terms == "distances" else 1.0)
        self.inputs = tuple(
            tensor.to(device, self.dtype) for tensor in (queries, normal(groups), normal(groups))
        )
        self.table = torch.randn(BUCKETS, HEADS, generator=source).to(device)
        tokens = torch.full((batch, groups), float(k), device=device)
        tokens[:, -1] = length - k * (groups - 1)
        self.members = torch.arange(k, device=device) < tokens[..., None]
        self.counts = tokens.log()

    def added(self, wide: torch.dtype = torch.float32) -> dict[str, Any]:
        """The arguments of grouped_attention beside queries, keys and values."""
        if self.terms == "tokens":
            return {"bias": self.counts.to(wide)} if self.k > 1 else {}
        batch, length = self.size
        places = torch.arange(length, device=self.device).expand(batch, -1)
        members = self.members if self.k > 1 else None
        made = distance_bias(
            self.table.to(wide), queries=places, keys=places[:, :: self.k], members=members,
            dtype=wide,
        )  # fmt: skip
        return {"relative": made, "scale": 1.0}

    def exact(self) -> Truth:
        """Float64, and the error of plain PyTorch in the arms' dtype."""
        wide = [tensor.double() for tensor in self.inputs]
        exact = grouped_attention(*wide, **self.added(torch.float64), backend="reference")
        plain = grouped_attention(*self.inputs, **self.added(), backend="reference")
        return truth((exact,), (plain,))

    def call(self, arm: str) -> Call:
        """What is timed, ``[B, n, H, d]``; raises ``Unavailable`` where it cannot run."""
        added = self.added()
        if arm != SDPA:
            name = self.backend if arm == OURS else REFERENCE
            backend = name if name == "auto" else usable(name)
            return lambda: (grouped_attention(*self.inputs, **added, backend=backend),)
        mask = None
        if "bias" in added:
            mask = added["bias"][:, None, None].to(self.dtype)
        elif "relative" in added:  # the same for all rows
            mask = internals.looked_up(added["relative"])[:1].to(self.dtype).contiguous()
        scale = added.get("scale")

        def sdpa() -> Outputs:
            q, k, v = (tensor.transpose(1, 2) for tensor in self.inputs)
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
            return (out.transpose(1, 2),)

        return sdpa


def case(work: Work, name: str, dtype: str, arms: Iterable[str] = ARMS) -> Case:
    batch, length = work.size
    made = Case(name, "kernel", "forward", MODELS[work.terms], dtype, batch, length,
                lambda key: work.exact())  # fmt: skip
    made.arms = [Arm(Key(arm, work.k), partial(work.call, arm), batch * length) for arm in arms]
    return made
