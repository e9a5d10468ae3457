"""One run of one training step: folders and files in, plugins out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoTokenizer, set_seed
from transformers import AutoModelForSeq2SeqLM as Seq2Seq
from transformers import AutoModelForSequenceClassification as Classifier

from ..checkpoint import load_plugins
from ..methods.variator.calibration import calibrate
from ..patching import patch, unpatch
from ..runtime.level import mentioned
from ..runtime.state import states
from . import checkpoints, data, noise, rows, task
from .collate import batches, collator
from .config import DistillationConfig, fingerprint
from .embeddings import MODULES, Pooler, is_embedder
from .embeddings import load as load_embedder
from .evaluation import Correct
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
    if job.step == "pretrain" and (config.task_weight or config.logits_weight):
        raise ValueError("task_weight and logits_weight must be 0 in pretrain: it has no task")
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
    digests = {name: _digest(getattr(job, name)) for name in ("data", "eval_data")}
    settings = {**asdict(job), **fingerprint(config), "sha256": digests}
    settings = json.loads(json.dumps(settings))
    _check_same(output, settings)
    if (output / METRICS).is_file():
        LOG.info("%s holds this run, finished: there is nothing to do", output)
        return json.loads((output / METRICS).read_text(encoding="utf-8"))
    set_seed(config.seed)
    model, tokenizer, pooler = _load(job)
    train, correct = _rows(job, job.data, model, tokenizer, config.seed)
    if job.splice:
        mixed = noise.spliced(train.rows, tokenizer, job.splice)
        train = train.corrupted(noise.chained(mixed, train.noise), config.seed)
    held_out = job.eval_data and _rows(job, job.eval_data, model, tokenizer, config.seed)[0]
    plugged(model, job)
    pad = collator(tokenizer, model.config)
    if (found := checkpoints.last(output)) is not None:
        LOG.info("%s holds this run: it goes on from %s", output, found.name)
    elif job.calibrate:
        calibrate(model, batches(train.spread(job.calibrate), pad))
    config.sample_ratios = job.level is None and len(states(model)[0].ratios) > 1
    config.output_dir = str(output)
    config.eval_strategy = config.eval_strategy if held_out else "no"
    trainer = DistillationTrainer(
        model,
        config,
        train_dataset=train,
        eval_dataset=held_out,
        correct=correct,
        pooler=pooler,
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


def plugged(model: Any, job: Job) -> None:
    """Patch ``model`` and fill the plugins that training starts from."""
    ratios: Any = job.ratios or (4,)
    placements = job.placements or ("ffn",)
    bottleneck, activation = job.bottleneck, job.activation
    if job.plugins:
        load_plugins(model, job.plugins)  # patches it as they need
        (saved,) = states(model)
        unpatch(model)
        config = saved.method.config
        placements = job.placements or tuple(config.placements)
        if not job.ratios:
            ratios = {place: config.placements.get(place, saved.ratios) for place in placements}
        bottleneck, activation = bottleneck or config.bottleneck, activation or config.activation
    if job.level is not None:
        level = {place: _by_layer(ratio) for place, ratio in job.level.items()}
        ratios = {place: mentioned(ratio) for place, ratio in level.items()}
    patch(
        model,
        None if job.level is None else level,
        ratios,
        bottleneck or 64,
        activation or "tanh",
        placements=placements if job.level is None else ("ffn",),
        backend=job.backend,
        keep_first=job.keep_first,
        keep_last=job.keep_last or 0,
        keep=job.keep,
    )
    if job.plugins:
        load_plugins(model, job.plugins)


def _by_layer(ratio: Any) -> Any:
    """JSON's keys are strings."""
    if not isinstance(ratio, dict):
        return ratio
    return {int(layer): k for layer, k in ratio.items()}


def _load(job: Job) -> tuple[Any, Any, Pooler | None]:
    """The model in fp32, with the head that the step needs, its tokenizer, and how it pools."""
    if job.step == "pretrain" and is_embedder(job.model):
        return load_embedder(job.model, job.attention)
    if not (Path(job.model) / "config.json").is_file():
        raise FileNotFoundError(f"model must be a folder with config.json, got {job.model!r}")
    known = AutoConfig.from_pretrained(job.model, local_files_only=True)
    if job.step == "pretrain":
        kind = AutoModel
    else:
        kind = Seq2Seq if known.is_encoder_decoder else Classifier
    model, found = kind.from_pretrained(
        job.model,
        local_files_only=True,
        dtype="float32",
        attn_implementation=job.attention,
        output_loading_info=True,
    )
    if job.step == "adapt" and (missing := sorted(found["missing_keys"])):
        raise ValueError(
            f"model must be fine-tuned on its task before adapt, {job.model} has no {missing[0]}: "
            "its answers would be random"
        )
    return model, AutoTokenizer.from_pretrained(job.model, local_files_only=True), None


def _rows(
    job: Job, source: str, model: Any, tokenizer: Any, seed: int
) -> tuple[rows.Rows, Correct | None]:
    read = data.read(source, job.columns)
    limit = _limit(model.config)
    if job.step == "pretrain":
        read = [data.Row(row.place, {data.TEXT: row.values[job.texts[0]]}) for row in read]
        length = min(job.max_length or 128, limit or 1 << 30)
        varied = seed if job.vary_lengths else None
        pieces = rows.paragraphs(read, tokenizer, length, varied)
        return rows.Rows(pieces, _noise(job, model, tokenizer), seed), None
    labels, correct = task.targets(
        read, job.label, task.names_of(model, job.labels), model, tokenizer
    )
    text = job.texts
    if job.template is not None:
        text = (data.TEXT,)
        read = [data.Row(row.place, {data.TEXT: job.template.format(**row.values)}) for row in read]
    made = rows.examples(read, text, tokenizer, job.max_length, limit)
    for row, label in zip(made, labels, strict=True):
        row["labels"] = label
    return rows.Rows(made), correct


def _noise(job: Job, model: Any, tokenizer: Any) -> rows.Noise | None:
    if job.noise == "default":
        spans = model.config.is_encoder_decoder
        return (noise.corrupted_spans if spans else noise.masked_tokens)(tokenizer)
    if model.config.is_encoder_decoder:
        raise ValueError(
            "noise must be default for an encoder-decoder, which learns to fill the corrupted "
            f"spans, got {job.noise!r}"
        )
    return None


def _limit(config: Any) -> int | None:
    """The most tokens that the model takes; relative positions have no end."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type == "roberta":
        positions -= config.pad_token_id + 1  # its positions start behind the padding's
    return positions


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
    """At once or not at all."""
    part = path.with_name(f".{path.name}")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
