"""The originals: a pretrained model fine-tuned on a task, or a small T5 trained from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from variator_kernels.train.collate import batches, collator
from variator_kernels.train.resumable import ResumableTrainer


def finetune(model: Any, tokenizer: Any, train: Any, folder: Path, **settings: Any) -> None:
    """Train the whole model on its own loss; model and tokenizer end up in ``folder``.

    Goes on where it was if it was killed.
    """
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        remove_unused_columns=False,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=50,
        save_total_limit=1,
        **settings,
    )
    trainer = ResumableTrainer(
        model, arguments, train, data_collator=collator(tokenizer, model.config)
    )
    trainer.train(resume_from_checkpoint=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, dev: Any, correct: Any, batch: int = 64) -> float:
    """Share of rows answered right."""
    model.eval()
    right = 0
    for inputs in batches(dev, collator(tokenizer, model.config), batch):
        right += int(correct(model(**inputs), inputs).sum())
    return right / len(dev)
