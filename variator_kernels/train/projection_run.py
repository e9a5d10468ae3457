"""One run of ``project``: a folder and text in, a small model out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers import set_seed as seeded

from ..methods.projected import merge, project, stored
from . import checkpoints, noise, prompts, rows
from .collate import batches, collator
from .data import TEXT, Row, read
from .decoders import is_decoder
from .output import METRICS, SETTINGS, finished, goes_on_by_itself, settings_of, write
from .projection import ProjectionTrainer
from .projection_config import ProjectionConfig, fingerprint

MERGED = "merged"
"""The folder in the output that plain ``transformers`` loads."""
LENGTH = 128
"""Tokens of a T5's piece, where nobody says."""
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProjectionJob:
    """What to project and train on what; the fields are those of the command line."""

    model: str
    data: str
    output: str
    params: float | None = None
    hidden: int | None = None
    ffn: int | None = None
    split: str | None = None
    start: str = "pca"
    importance: str | None = None
    calibrate: int = 32
    eval_data: str | None = None
    text: str = TEXT
    max_length: int | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        if self.calibrate < 1:
            raise ValueError(f"calibrate must be >= 1, got {self.calibrate}")


def run(job: ProjectionJob, config: ProjectionConfig) -> dict[str, float]:
    """Project, train, or go on training, and write ``merged/`` and ``metrics.json`` to
    ``job.output``.

    Killed at any moment and called again with the same arguments it goes on from the newest
    checkpoint and ends with the same model. A finished run is not repeated.

    Returns:
        The metrics of the last evaluation; empty without ``eval_data``.

    Raises:
        FileNotFoundError, ValueError: a file or an argument does not fit, or ``output`` holds
        another run. FloatingPointError: a loss was not finite. Checkpoints stay as they were.
    """
    goes_on_by_itself(config)
    output = Path(job.output)
    settings = settings_of(job, fingerprint(config))
    if (done := finished(output, settings, (ProjectionJob, ProjectionConfig))) is not None:
        return done
    seeded(config.seed)
    model, tokenizer = load(job)
    train = rows_of(job, job.data, model, tokenizer, config.seed)
    held_out = job.eval_data and rows_of(job, job.eval_data, model, tokenizer, config.seed)
    pad = collator(tokenizer, model.config)
    if (found := checkpoints.last(output)) is not None:
        LOG.info("%s holds this run: it goes on from %s", output, found.name)
        small = stored.rebuild(model, found)
        LOG.info("%s", small.variator_projection)
    else:
        small = project(
            model,
            batches(train.spread(job.calibrate), pad, config.per_device_train_batch_size),
            job.params,
            hidden=job.hidden,
            ffn=job.ffn,
            split=job.split,
            start=job.start,
            importance=job.importance,
        )
    config.output_dir = str(output)
    config.eval_strategy = config.eval_strategy if held_out else "no"
    trainer = ProjectionTrainer(
        small,
        config,
        train_dataset=train,
        eval_dataset=held_out,
        teacher=model,
        data_collator=pad,
    )
    if config.should_save:
        output.mkdir(parents=True, exist_ok=True)
        write(output / SETTINGS, settings)
    trainer.train(resume_from_checkpoint=True)
    metrics = trainer.evaluate() if held_out else {}
    trainer.accelerator.wait_for_everyone()
    if config.should_save:
        merged = merge(trainer.model)
        merged.save_pretrained(output / MERGED)
        tokenizer.save_pretrained(output / MERGED)
        write(output / METRICS, metrics)
    return metrics


def load(job: ProjectionJob) -> tuple[Any, Any]:
    """The model in fp32 with the head of its language, and its tokenizer."""
    if not (Path(job.model) / "config.json").is_file():
        raise FileNotFoundError(f"model must be a folder with config.json, got {job.model!r}")
    known = AutoConfig.from_pretrained(job.model, local_files_only=True)
    if not (is_decoder(known) or known.is_encoder_decoder):
        raise ValueError(
            f"model must be a decoder or a T5, got model_type {known.model_type!r}: train others "
            "with vk.project and ProjectionTrainer on batches with labels"
        )
    kind: Any = AutoModelForCausalLM if is_decoder(known) else AutoModelForSeq2SeqLM
    model = kind.from_pretrained(
        job.model, local_files_only=True, dtype="float32", attn_implementation=job.attention
    )
    tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True)
    if is_decoder(known) and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # the mask tells which of them are padding
    return model, tokenizer


def rows_of(job: ProjectionJob, source: str, model: Any, tokenizer: Any, seed: int) -> rows.Rows:
    """Text in rows of one length, every token a label; a T5's with corrupted spans."""
    found = [Row(row.place, {TEXT: row.values[job.text]}) for row in read(source, (job.text,))]
    if not model.config.is_encoder_decoder:
        limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        length = min(job.max_length or prompts.LENGTH, limit)
        return rows.Rows(prompts.packed(found, tokenizer, length, None))
    pieces = rows.paragraphs(found, tokenizer, job.max_length or LENGTH)
    return rows.Rows(pieces, noise.corrupted_spans(tokenizer), seed)
