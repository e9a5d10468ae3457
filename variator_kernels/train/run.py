"""One run of one training step: folders and files in, plugins out."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import set_seed

from ..methods.variator.calibration import calibrate
from ..runtime.state import states
from . import checkpoints, noise, prepare
from .collate import batches, collator
from .config import DistillationConfig, fingerprint
from .embeddings import MODULES, is_embedder
from .job import Job
from .output import METRICS, SETTINGS, digest, finished, goes_on_by_itself, settings_of, write
from .trainer import DistillationTrainer

LOG = logging.getLogger(__name__)


def run(job: Job, config: DistillationConfig) -> dict[str, float]:
    """Train, or go on training, and write ``plugins.*`` and ``metrics.json`` to ``job.output``.

    Killed at any moment and called again with the same arguments it goes on from the newest
    checkpoint and ends with the same plugins. A finished run is not repeated.

    Returns:
        The metrics of the last evaluation; empty without ``eval_data``.

    Raises:
        FileNotFoundError, ValueError: a file or an argument does not fit, or ``output`` holds
        another run. FloatingPointError: the loss was not finite. Checkpoints stay as they were.
    """
    if config.embedding_weight and job.step == "adapt":
        raise ValueError(
            "embedding_weight must be 0 in adapt, a task's model has no embedding: use pretrain"
        )
    if config.embedding_weight and not is_embedder(job.model):
        raise ValueError(
            f"embedding_weight must be 0, or model must be a folder of sentence-transformers (with "
            f"{MODULES}): {job.model} does not say how it pools"
        )
    if job.splice and config.task_weight:
        raise ValueError(
            "splice must be 0 with task_weight, the labels of spliced rows do not hold, got "
            f"{job.splice} and {config.task_weight}"
        )
    goes_on_by_itself(config)
    output = Path(job.output)
    plans = {"plans": [digest(path) for path in job.plans]} if job.plans else {}
    settings = settings_of(job, fingerprint(config), **plans)
    if (done := finished(output, settings, (Job, DistillationConfig))) is not None:
        return done
    set_seed(config.seed)
    model, tokenizer, pooler = prepare.load(job)
    prepare.plugged(model, job)
    prepare.check(job, config, model)
    train, correct = prepare.rows_of(job, job.data, model, tokenizer, config.seed)
    if job.splice:
        mixed = noise.spliced(train.rows, tokenizer, job.splice)
        train = train.corrupted(noise.chained(mixed, train.noise), config.seed)
    held_out = (
        job.eval_data and prepare.rows_of(job, job.eval_data, model, tokenizer, config.seed)[0]
    )
    pad = collator(tokenizer, model.config)
    if (found := checkpoints.last(output)) is not None:
        LOG.info("%s holds this run: it goes on from %s", output, found.name)
    elif job.calibrate:
        one = job.level is not None or len(job.levels) == 1
        only = [states(model)[0].level] if one else None
        bar = config.should_log and not config.disable_tqdm  # which prints the table, too
        table = calibrate(model, batches(train.spread(job.calibrate), pad), only, progress=bar)
        if not bar:
            LOG.info("the last hidden state's error before and after calibration:\n%s", table)
    one_level = job.level is not None or bool(job.levels)
    config.sample_ratios = not one_level and len(states(model)[0].ratios) > 1
    config.output_dir = str(output)
    config.eval_strategy = config.eval_strategy if held_out else "no"
    trainer = DistillationTrainer(
        model,
        config,
        train_dataset=train,
        eval_dataset=held_out,
        correct=correct,
        pooler=pooler,
        levels=job.levels or None,
        data_collator=pad,
    )
    if config.should_save:
        output.mkdir(parents=True, exist_ok=True)
        write(output / SETTINGS, settings)
    trainer.train(resume_from_checkpoint=True)
    metrics = trainer.evaluate() if held_out else {}
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(output), _internal_call=True)
    if config.should_save:
        write(output / METRICS, metrics)
    return metrics
