"""What a decoder says next: distances of distributions over the vocabulary, a chunk at a time.

A row of 512 tokens has 100 MB of fp32 logits in a vocabulary of 49,152. So the head runs on a few
positions at once, and where gradients are wanted they are made in the same go: of logits nothing
stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .losses import IGNORED

CHUNK = 1 << 25
"""The most bytes of fp32 logits that are made at a time, of each model."""


class Head:
    """``head(hidden [N, d])``: logits ``[N, V]`` of the last hidden states.

    Args:
        model: with output embeddings.
    """

    def __init__(self, model: Any) -> None:
        self.layer: nn.Module = model.get_output_embeddings()
        self.cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.layer(hidden)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def parts(self, hidden: Tensor) -> Iterator[slice]:
        """Of the rows of ``hidden``: so many that their logits fit into :data:`CHUNK`."""
        weight: Any = self.layer.weight
        size = max(1, CHUNK // (4 * weight.shape[0]))
        for start in range(0, len(hidden), size):
            yield slice(start, start + size)


@torch.no_grad()
def check_head(model: Any, head: Head) -> None:
    """Nothing else stands between the last hidden states and the logits.

    Raises:
        ValueError: ``model`` makes other logits than ``head``.
    """
    ids = torch.tensor([[1, 2]], device=model.device)
    out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    if not torch.allclose(head(out.hidden_states[-1]).float(), out.logits.float(), atol=1e-3):
        raise ValueError(
            f"model {type(model).__name__} must make its logits of the last hidden states by its "
            "output embeddings alone, it does not: set logits_weight and task_weight to 0"
        )


def predictions(hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """``[N, d]``: the last hidden states in front of each token that has a label."""
    return hidden[:, :-1][batch["labels"][:, 1:] != IGNORED]


def targets(batch: Mapping[str, Any]) -> Tensor:
    """``[N]``: these tokens. The first of a row follows nothing, whatever its label is."""
    labels = batch["labels"][:, 1:]
    return labels[labels != IGNORED]


def per_token(
    head: Head, student: Tensor, teacher: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Of each prediction, ``[N]`` fp32: the KL divergence of the student's distribution from the
    teacher's (0 without a teacher), and minus the logarithm of the student's probability of its
    label. Nothing gets a gradient."""
    apart, unlikely = student.new_zeros(2, len(student), dtype=torch.float32)
    with torch.no_grad():
        for part in head.parts(student):
            beside = None if teacher is None else teacher[part]
            apart[part], unlikely[part] = _distances(head, student[part], beside, labels[part])
    return apart, unlikely


def loss(
    head: Head,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    logits_weight: float,
    task_weight: float,
) -> Tensor:
    """The weighted sum of both distances over all predictions, differentiable in ``student``."""
    weights = logits_weight, task_weight
    return _Loss.apply(student, teacher, labels, head, weights)  # type: ignore[no-any-return]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        head: Head,
        weights: tuple[float, float],
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        total = student.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(student) if wanted else None
        for part in head.parts(student):
            with torch.set_grad_enabled(wanted):
                ours = student[part].detach().requires_grad_(wanted)
                apart, unlikely = _distances(
                    head, ours, teacher[part] if weights[0] else None, labels[part]
                )
                weighted = weights[0] * apart.sum() + weights[1] * unlikely.sum()
                if gradient is not None:
                    (gradient[part],) = torch.autograd.grad(weighted, ours)
            total += weighted.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


def _distances(
    head: Head, student: Tensor, teacher: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    logits = head(student).float()
    ours = logits.log_softmax(-1)
    unlikely = F.nll_loss(ours, labels, reduction="none")
    if teacher is None:
        return torch.zeros_like(unlikely), unlikely
    with torch.no_grad():
        theirs = head(teacher).float().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1), unlikely
