"""How plugins are trained: every hyper-parameter, in one dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_accelerate_available

STEPS = ("pretrain", "adapt")
STEP_DEFAULTS: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "adapt": {
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 32,
        "max_steps": 26_000,
        "lr_scheduler_type": "constant_with_warmup",
    },
}
"""What a step does otherwise than :class:`DistillationConfig`'s defaults."""
SCHEDULE = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "warmup_steps",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lr_scheduler_kwargs",
    "seed",
    "bf16",
    "fp16",
    "load_best_model_at_end",
)
"""The fields of ``TrainingArguments`` that decide what a run ends with."""


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def require_accelerate() -> None:
    """``ImportError`` without a recent one: ``transformers`` would name an extra of its own."""
    if not is_accelerate_available():
        raise ImportError(
            "training needs a recent version of the package accelerate: "
            "pip install -U 'variator-kernels[train]', or pip install -U accelerate"
        )


@dataclass
class DistillationConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with the values of the paper's released scripts.

    The defaults are those of pre-training, for T5 at k = 4: Adam at 1e-3, falling linearly after
    50 steps of warm-up, 64 paragraphs of 128 tokens a step (over all devices), 60,000 steps, weight
    decay 1e-5, gradients clipped at norm 10. :func:`config_for` gives those of adaptation: 1e-5
    held constant, 32 rows a step, 26,000 steps. Short runs want a higher rate (``README``).

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    learning_rate: float = option(1e-3, "initial learning rate of Adam")
    per_device_train_batch_size: int = option(64, "rows a device and step")
    max_steps: int = option(60_000, "number of steps; -1: num_train_epochs decides")
    warmup_steps: float = option(50, "steps over which the rate rises from 0")
    weight_decay: float = option(1e-5, "of AdamW; the merge's bias has none")
    max_grad_norm: float = option(10.0, "gradients are clipped at this norm")
    logging_steps: float = option(50, "steps between two lines of the log")
    eval_steps: float | None = option(2000, "steps between two evaluations")
    save_steps: float = option(500, "steps between two checkpoints")
    save_total_limit: int | None = option(2, "checkpoints that are kept")
    remove_unused_columns: bool = option(False, "the collators decide what a batch holds")

    sample_ratios: bool = option(
        False, "train the plugins of all ratios of the model, in turn; the command line always does"
    )
    ratios_per_step: int = option(
        1, "with sample_ratios: how many ratios share the rows and the teacher's run of a step"
    )
    task_weight: float = option(0.0, "weight of the model's own loss (paper: 0 is best)")
    layer_weight: float = option(0.0, "weight of matching the output of every layer")
    logits_weight: float = option(
        0.0, "weight of matching the teacher's class distribution, or a decoder's next-token one"
    )
    embedding_weight: float = option(
        0.0, "weight of matching a sentence-transformers model's own embeddings"
    )
    key_rate: float = option(
        1.0, "times the learning rate: that of the merges in front of attention's keys and values"
    )
    dropout: bool = option(False, "leave the model's dropout on while its plugins train")
    packed_products: bool = option(
        True, "on the CPU: keep the frozen weights packed, two copies of each, which is faster"
    )
    group_by_length: bool = option(True, "put rows of similar length into one step")

    def __post_init__(self) -> None:
        require_accelerate()
        for name in ("task_weight", "layer_weight", "logits_weight", "embedding_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        if not 0 < self.key_rate < float("inf"):
            raise ValueError(f"key_rate must be a finite number > 0, got {self.key_rate!r}")
        if self.label_smoothing_factor:
            got = self.label_smoothing_factor
            raise ValueError(f"label_smoothing_factor must be 0, no loss here uses it, got {got!r}")
        if self.ratios_per_step < 1:
            raise ValueError(f"ratios_per_step must be >= 1, got {self.ratios_per_step!r}")
        if not hasattr(self, "activation_checkpointing") and self.gradient_checkpointing:
            # By default older versions of transformers lose the gradients behind a frozen input.
            me: Any = self
            asked = me.gradient_checkpointing_kwargs or {}
            me.gradient_checkpointing_kwargs = {"use_reentrant": False} | asked
        # Pinning needs a device to copy to, and warns once a loader without one.
        self.dataloader_pin_memory &= torch.cuda.is_available()
        super().__post_init__()


def config_for(step: str, **changes: Any) -> DistillationConfig:
    """The defaults of one of the two training steps, with ``changes``.

    Args:
        step: ``"pretrain"`` or ``"adapt"``.
        changes: fields of :class:`DistillationConfig`.
    """
    if step not in STEPS:
        raise ValueError(f"step must be one of {STEPS}, got {step!r}")
    return DistillationConfig(**STEP_DEFAULTS[step] | changes)


def fingerprint(config: DistillationConfig) -> dict[str, Any]:
    """The fields that decide what a run ends with, as JSON can hold them."""
    own = set(DistillationConfig.__annotations__) - set(TrainingArguments.__dataclass_fields__)
    values = config.to_dict()
    found = {name: values[name] for name in (*SCHEDULE, *sorted(own | {"group_by_length"}))}
    found["processes"] = config.world_size  # a step's rows are shared among them
    return found | ({"fsdp": True} if config.fsdp else {})  # whose checkpoints are others
