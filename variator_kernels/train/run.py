"""One run of one training step: folders and files in, plugins out."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers import set_seed

from .. import files
from ..methods.variator.calibration import calibrate
from ..runtime.state import states
from . import checkpoints, noise, prepare
from .collate import batches, collator
from .config import DistillationConfig, fingerprint
from .embeddings import MODULES, is_embedder
from .job import Job
from .trainer import DistillationTrainer

SETTINGS, METRICS = "run.json", "metrics.json"
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
    if config.resume_from_checkpoint:
        raise ValueError(
            "resume_from_checkpoint must not be given: a run goes on from output's newest "
            f"checkpoint by itself, got {config.resume_from_checkpoint!r}"
        )
    output = Path(job.output)
    digests: dict[str, Any] = {name: _digest(getattr(job, name)) for name in ("data", "eval_data")}
    if job.plans:
        digests["plans"] = [_digest(path) for path in job.plans]
    settings = {**asdict(job), **fingerprint(config), "sha256": digests}
    settings = json.loads(json.dumps(settings))
    _check_same(output, settings)
    if (output / METRICS).is_file():
        LOG.info("%s holds this run, finished: there is nothing to do", output)
        return json.loads((output / METRICS).read_text(encoding="utf-8"))
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
        calibrate(model, batches(train.spread(job.calibrate), pad))
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
        _write(output / SETTINGS, settings)
    trainer.train(resume_from_checkpoint=True)
    metrics = trainer.evaluate() if held_out else {}
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(output), _internal_call=True)
    if config.should_save:
        _write(output / METRICS, metrics)
    return metrics


def _digest(source: str | None) -> str | None:
    """Of a file's content; None for what is no file."""
    path = Path(source or "")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _check_same(output: Path, settings: dict[str, Any]) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, got the file {output}")
    if (output / "config.json").is_file():
        raise ValueError(f"output must be a folder of its own, {output} holds a model")
    if not (output / SETTINGS).is_file():
        if checkpoints.every(output):
            raise ValueError(f"output {output} holds another program's checkpoints: name another")
        return
    # What the version that wrote it did not have was at its default.
    kinds: tuple[Any, ...] = (Job, DistillationConfig)
    before = {field.name: field.default for kind in kinds for field in fields(kind)}
    before = {name: before[name] for name in settings if name in before}
    before |= json.loads((output / SETTINGS).read_text(encoding="utf-8"))
    for name in {**before, **settings}:
        if name != "output" and before.get(name) != settings.get(name):
            raise ValueError(
                f"output {output} holds a run with {name}={before.get(name)!r}, now it is "
                f"{settings.get(name)!r}: name another folder, or the same settings"
            )


def _write(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1) + "\n"
    files.replace(path, lambda to: to.write_text(text, encoding="utf-8"))
