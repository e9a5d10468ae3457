"""Perplexity behind a compressed prompt, over that of the dense model on the same tokens."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LAST = 64
"""Tokens of a sequence that are predicted; those before are the prompt."""
BATCH = 8


@torch.no_grad()
def losses(
    model: Any,
    sequences: Tensor,
    behind: Callable[[], AbstractContextManager] = nullcontext,
    step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Mean negative log-likelihood of the last tokens of each of ``sequences [N, n]``: ``[N]``.

    The prompt is one forward; the last tokens are another, under ``behind()``, which must do what
    single steps do.
    """
    found = []
    for some in sequences.split(BATCH):
        prompt, rest = some[:, :-LAST], some[:, -LAST:]
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        with behind():
            more = model(input_ids=rest[:, :-1], past_key_values=out.past_key_values)
        logits = torch.cat((out.logits, more.logits), 1).float()
        found.append(F.cross_entropy(logits.transpose(1, 2), rest, reduction="none").mean(1))
        step()
    return torch.cat(found).double()


def over(losses: Tensor, dense: Tensor) -> dict[str, float]:
    """The ratio of two perplexities, and its standard error over sequences, which are pairs."""
    difference = losses - dense
    ratio = difference.mean().exp().item()
    spread = difference.std().item() if len(difference) > 1 else 0.0
    values = {"perplexity": losses.mean().exp().item(), "over_dense": ratio}
    return values | {"error": ratio * spread / len(difference) ** 0.5}
