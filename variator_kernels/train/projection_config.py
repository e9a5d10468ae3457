"""How projected models are trained: every hyper-parameter, in one dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from ..methods.projected import groups
from .config import SCHEDULE, option, require_accelerate


@dataclass
class ProjectionConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with what Projected Compression has besides.

    ``learning_rate`` and ``weight_decay`` are those of A; P has its own. ``max_grad_norm`` clips at
    the norm of the compressed gradient, that of W_C and of all that is not composed.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    learning_rate: float = option(1e-3, "initial learning rate of A, norms and biases")
    per_device_train_batch_size: int = option(16, "rows a device and batch")
    max_steps: int = option(1000, "number of steps; -1: num_train_epochs decides")
    warmup_steps: float = option(50, "steps over which the rate rises from 0")
    weight_decay: float = option(0.0, "of A")
    max_grad_norm: float = option(1.0, "clips the compressed gradient at this norm; 0: it does not")
    logging_steps: float = option(50, "steps between two lines of the log")
    eval_steps: float | None = option(500, "steps between two evaluations")
    save_steps: float = option(500, "steps between two checkpoints")
    save_total_limit: int | None = option(2, "checkpoints that are kept")
    remove_unused_columns: bool = option(False, "the collators decide what a batch holds")

    projection_rate: float = option(groups.RATE, "times the learning rate: that of P")
    projection_decay: float = option(0.0, "weight decay of P")
    teacher_weight: float = option(
        0.5, "weight of the divergence from the original's distribution, beside 1 minus it of the "
        "cross-entropy; 0: the original does not run"
    )  # fmt: skip
    frozen_on_cpu: bool = option(False, "leave frozen weights on the CPU; they come once a step")
    group_by_length: bool = option(False, "put rows of similar length into one step")

    def __post_init__(self) -> None:
        require_accelerate()
        if not 0 < self.projection_rate < math.inf:
            raise ValueError(
                f"projection_rate must be a finite number > 0, got {self.projection_rate!r}"
            )
        if not 0 <= self.projection_decay < math.inf:
            raise ValueError(
                f"projection_decay must be a finite number >= 0, got {self.projection_decay!r}"
            )
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight must be from 0 to 1, got {self.teacher_weight!r}")
        if self.label_smoothing_factor:
            got = self.label_smoothing_factor
            raise ValueError(f"label_smoothing_factor must be 0, no loss here uses it, got {got!r}")
        if self.fp16:
            raise ValueError("fp16 must be False, gradients of W_C are not scaled back: use bf16")
        if self.warmup_steps == int(self.warmup_steps):
            self.warmup_steps = int(self.warmup_steps)  # transformers 4 takes no other
        self.dataloader_pin_memory &= torch.cuda.is_available()
        super().__post_init__()


OWN = ("projection_rate", "projection_decay", "teacher_weight", "group_by_length")


def fingerprint(config: ProjectionConfig) -> dict[str, object]:
    """The fields that decide what a run ends with, as JSON can hold them."""
    values = config.to_dict()
    found = {name: values[name] for name in (*SCHEDULE, *OWN)}
    return found | {"processes": config.world_size}
