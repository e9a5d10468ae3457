"""A Trainer whose runs can be killed at any moment and go on exactly where they were."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from . import checkpoints
from .stream import Stream


class ResumableTrainer(Trainer):
    """``transformers.Trainer`` with two changes.

    Its checkpoints appear whole or not at all, those of others stay, and
    ``train(resume_from_checkpoint=True)`` goes on from the newest whole one, or starts if there is
    none. Its rows come from a :class:`Stream`, whose order depends on the seed alone: skipping what
    a checkpoint has seen is exact.

    Args:
        train_dataset: map-style, rows of dicts with ``input_ids``.
        group: put rows of similar length into one step.
        rest: as for ``transformers.Trainer``.
    """

    control: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: Any = None,
        *,
        group: bool = True,
        **rest: Any,
    ) -> None:
        self.passes: float | None = None
        if train_dataset is not None:
            rows, train_dataset = len(train_dataset), _stream(train_dataset, args, group)
            self.passes = len(train_dataset) / rows
        super().__init__(model, args, train_dataset=train_dataset, **rest)

    def train(self, resume_from_checkpoint: str | bool | None = None, **rest: Any) -> Any:
        if resume_from_checkpoint is True:
            found = checkpoints.last(str(self.args.output_dir))
            resume_from_checkpoint = None if found is None else str(found)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **rest)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.passes is not None and self.state.max_steps:
            # The stream holds the rows of all steps: for the Trainer a run is one pass.
            self.state.epoch = self.passes * self.state.global_step / self.state.max_steps
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(str(self.args.output_dir))
        folder = output / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.start(folder)
        # Older checkpoints go once this one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.finish(folder)
            checkpoints.clean(output, limit, folder, self.state.best_model_checkpoint or folder)


def _stream(rows: Any, args: TrainingArguments, group: bool) -> Stream:
    if not len(rows):
        raise ValueError("train_dataset must have rows, got none")
    devices = args.world_size * args.gradient_accumulation_steps
    batch = args.per_device_train_batch_size * devices
    if args.max_steps <= 0:
        args.max_steps = math.ceil(args.num_train_epochs * len(rows) / batch)
    return Stream(rows, args.max_steps * batch, batch, args.seed, group)
