"""What a step minimises: how far a compressed model, the student, is from itself at ratio 1."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.level import Level
from ..runtime.levels import use_ratio
from . import losses
from .config import DistillationConfig
from .embeddings import Pooler

Batch = Mapping[str, Any]


class Objective:
    """Of an encoder, or of an encoder-decoder.

    Args:
        model: patched.
        pooler: for ``embedding_weight``.

    Raises:
        ValueError: there is gradient checkpointing, and the model's dropout is not wanted.
    """

    def __init__(
        self, model: nn.Module, args: DistillationConfig, pooler: Pooler | None = None
    ) -> None:
        self.model = model
        self.args = args
        self.pooler = pooler
        self.training_mode = _wants_training_mode(model, args)

    def teacher(self, forward: Any, batch: Batch) -> Any:
        """What the dense model makes of ``batch``; ``forward`` is the model, or a wrapper of it."""
        forward.eval()
        with torch.no_grad(), use_ratio(self.model, 1):
            return forward(**self.arguments(batch, labelled=False))

    def student(self, forward: Any, batch: Batch, level: Level) -> Any:
        """The same of the compressed model."""
        if self.training_mode and torch.is_grad_enabled():
            forward.train()  # else it stays as the teacher left it
        given = self.arguments(batch, labelled=self.args.task_weight > 0)
        with use_ratio(self.model, level), self.kept(batch, level):
            return forward(**given)

    def arguments(self, batch: Batch, labelled: bool) -> dict[str, Any]:
        """Those of a forward."""
        given = dict(batch) if labelled else losses.without_labels(batch)
        return given | {"output_hidden_states": True}

    def kept(self, batch: Batch, level: Level) -> AbstractContextManager[Any]:
        """Tokens of ``batch`` that stay whole at ``level`` beside those of the model."""
        return nullcontext()

    def counts(self, batch: Batch) -> Tensor:
        """What the parts of the loss are means over, see :func:`losses.counts`."""
        return losses.counts(batch)

    def distance(self, student: Any, teacher: Any, batch: Batch, total: Tensor) -> Tensor:
        """Everything that ``args`` asks for, weighted.

        Args:
            total: :meth:`counts` of all that the loss is a mean over.
        """
        args = self.args
        loss = losses.distillation(student, teacher, batch, total, args.layer_weight)
        loss = loss + self.answers(student, teacher, batch, total)
        if args.embedding_weight:
            assert self.pooler is not None
            apart = losses.embeddings(self.pooler, student, teacher, batch, total)
            loss = loss + args.embedding_weight * apart
        return loss

    def answers(self, student: Any, teacher: Any, batch: Batch, total: Tensor) -> Tensor:
        """The parts that look at what a model says, not at its hidden states."""
        args, loss = self.args, torch.zeros((), device=total.device)
        if (args.task_weight or args.logits_weight) and batch.get("labels") is None:
            raise ValueError(
                "a batch must have labels where task_weight or logits_weight is above 0, got one "
                f"with {sorted(batch)}"
            )
        if args.task_weight:
            loss = loss + args.task_weight * losses.task(student, batch, total)
        if args.logits_weight:
            loss = loss + args.logits_weight * losses.logits(student, teacher, batch, total)
        return loss

    def likelihoods(self, outputs: Any, teacher: Any, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Of a language model, ``[B]`` each: over the tokens of a row that have a label, the KL
        divergence of the next token's distribution from the teacher's, and minus the logarithm of
        the label's probability."""
        return None


def _wants_training_mode(model: nn.Module, args: DistillationConfig) -> bool:
    """Whether a student that learns runs in training mode: with dropout, or to save memory."""
    saves = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if args.dropout or not (saves or args.gradient_checkpointing):
        return args.dropout
    values: dict[str, Any] = model.config.to_dict()  # type: ignore[operator, union-attr]
    if any("drop" in name and isinstance(p, int | float) and p > 0 for name, p in values.items()):
        raise ValueError(
            "gradient checkpointing works in training mode alone: set dropout=True (and the "
            "configuration's dropout probabilities to 0 for the same loss)"
        )
    return True
