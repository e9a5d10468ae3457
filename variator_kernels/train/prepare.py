"""What a job names, made: the model with its plugins, and rows of token ids."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForSeq2SeqLM as Seq2Seq
from transformers import AutoModelForSequenceClassification as Classifier

from ..checkpoint import load_plugins
from ..patching import patch, unpatch
from ..runtime.level import mentioned
from ..runtime.plan import Plan
from ..runtime.state import states
from . import data, noise, prompts, rows, task
from .config import DistillationConfig
from .decoders import FFN, feed_forward_ratios, is_decoder
from .embeddings import Pooler, is_embedder
from .embeddings import load as load_embedder
from .evaluation import Correct
from .job import Job


def plugged(model: Any, job: Job) -> None:
    """Patch ``model`` and fill the plugins that training starts from."""
    ratios: Any = job.ratios or (4,)
    placements = job.placements or ("ffn",)
    active: Any = None
    bottleneck, activation = job.bottleneck, job.activation
    if job.plugins:
        _load(model, job.plugins)  # patches it as they need
        (saved,) = states(model)
        unpatch(model)
        config = saved.method.config
        placements = job.placements or tuple(config.placements)
        if not job.ratios:
            ratios = {place: config.placements.get(place, saved.ratios) for place in placements}
        bottleneck, activation = bottleneck or config.bottleneck, activation or config.activation
    if job.level is not None:
        active = {place: _by_layer(ratio) for place, ratio in job.level.items()}
        placements, ratios = ("ffn",), {p: mentioned(ratio) for p, ratio in active.items()}
    elif plans := list(job.levels.values()):
        active, placements = plans[0], ("ffn",)
        ratios = _ratios_of(plans, ratios if job.plugins else {})
    more: Any = {} if job.window is None else {"window": job.window}
    patch(
        model,
        active,
        ratios,
        bottleneck or 64,
        activation or "tanh",
        placements=placements,
        backend=job.backend,
        keep_first=job.keep_first,
        keep_last=job.keep_last or 0,
        keep=job.keep,
        **more,
    )
    if job.plugins:
        _load(model, job.plugins)


def _load(model: Any, folder: str) -> None:
    """Plugins to go on from: that they come from another checkpoint is what training is for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a model with other weights")
        load_plugins(model, folder)


def _ratios_of(plans: list[Plan], more: dict[str, Iterable[int]]) -> dict[str, list[int]]:
    """Those that plans for the same sites need, and ``more``; 4 where all of them are dense."""
    found = {}
    for place in plans[0].by_placement:
        every = {k for plan in plans for k in plan.by_placement.get(place, {}).values()}
        found[place] = sorted(every.union(more.get(place, ())) - {1}) or [4]
    return found


def _by_layer(ratio: Any) -> Any:
    """JSON's keys are strings."""
    if not isinstance(ratio, dict):
        return ratio
    return {int(layer): k for layer, k in ratio.items()}


def load(job: Job) -> tuple[Any, Any, Pooler | None]:
    """The model in fp32, with the head that the step needs, its tokenizer, and how it pools."""
    if job.step == "pretrain" and is_embedder(job.model):
        return load_embedder(job.model, job.attention)
    if not (Path(job.model) / "config.json").is_file():
        raise FileNotFoundError(f"model must be a folder with config.json, got {job.model!r}")
    known = AutoConfig.from_pretrained(job.model, local_files_only=True)
    kind: Any = AutoModel
    if is_decoder(known):
        kind = AutoModelForCausalLM
    elif job.step == "adapt":
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
    tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True)
    if is_decoder(known) and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # the mask tells which of them are padding
    return model, tokenizer, None


def check(job: Job, config: DistillationConfig, model: Any) -> None:
    """What is asked for makes sense for a model of this kind, which is patched.

    Raises:
        ValueError: it does not; the message says what to do instead.
    """
    if is_decoder(model.config):
        if job.step == "pretrain" and is_embedder(job.model):
            raise ValueError(
                "model must hold an encoder where it is one of sentence-transformers, "
                f"{job.model} holds a decoder: train a folder of the decoder itself"
            )
        if job.vary_lengths:
            raise ValueError(
                "vary_lengths must not be given for a decoder, whose rows are runs of one length: "
                "set max_length"
            )
        if job.calibrate and FFN not in states(model)[0].method.placements:
            raise ValueError(
                "calibrate must be 0 for a decoder without plugins for ffn, the merges of "
                f"attention_kv are trained from the mean, got {job.calibrate}"
            )
        if job.step == "adapt" and job.template is None and len(job.texts) > 1:
            raise ValueError(
                f"text must name one column for a decoder, got {job.texts}: a template makes one "
                "prompt of several columns"
            )
        return
    if job.step == "pretrain" and (config.task_weight or config.logits_weight):
        raise ValueError("task_weight and logits_weight must be 0 in pretrain: it has no task")
    for name in ("window", "continuation"):
        if getattr(job, name) is not None:
            raise ValueError(
                f"{name} must be given for decoders alone, got {getattr(job, name)} for a model of "
                f"type {model.config.model_type}"
            )


def rows_of(
    job: Job, source: str, model: Any, tokenizer: Any, seed: int
) -> tuple[rows.Rows, Correct | None]:
    read = data.read(source, job.columns)
    limit = _limit(model.config)
    if is_decoder(model.config):
        return _decoder_rows(job, read, model, tokenizer, limit)
    if job.step == "pretrain":
        read = _filled(read, job)
        length = min(job.max_length or 128, limit or 1 << 30)
        varied = seed if job.vary_lengths else None
        pieces = rows.paragraphs(read, tokenizer, length, varied)
        return rows.Rows(pieces, _noise(job, model, tokenizer), seed), None
    labels, correct = task.targets(
        read, job.label, task.names_of(model, job.labels), model, tokenizer
    )
    text = job.texts
    if job.template is not None:
        text, read = (data.TEXT,), _filled(read, job)
    made = rows.examples(read, text, tokenizer, job.max_length, limit)
    for row, label in zip(made, labels, strict=True):
        row["labels"] = label
    return rows.Rows(made), correct


def _decoder_rows(
    job: Job, read: list[data.Row], model: Any, tokenizer: Any, limit: int | None
) -> tuple[rows.Rows, Correct | None]:
    if job.step == "pretrain":
        length = min(job.max_length or prompts.LENGTH, limit or 1 << 30)
        made = prompts.packed(
            _filled(read, job), tokenizer, length, _continuation(job, model, length)
        )
        return rows.Rows(made), None
    answers = prompts.answers_of(read, job.label, job.labels)
    read = _filled(read, job)
    made = prompts.answered(read, answers, tokenizer, job.max_length, limit)
    return rows.Rows(made), prompts.by_label(model, tokenizer, read[0], made, job.labels)


def _continuation(job: Job, model: Any, length: int) -> int | None:
    """How many last tokens of a row count; None: all do, there is no compressed FFN."""
    (state,) = states(model)
    levels = [state.level] if job.level is not None else map(state.everywhere, state.ratios)
    if job.plans:
        levels = map(state.check, job.levels.values())
    if not feed_forward_ratios(state, levels):
        return job.continuation
    return length // 4 if job.continuation is None else job.continuation


def _filled(read: list[data.Row], job: Job) -> list[data.Row]:
    """Each row as one text."""
    if job.step == "pretrain" or job.template is None:
        return [data.Row(row.place, {data.TEXT: row.values[job.texts[0]]}) for row in read]
    return [data.Row(row.place, {data.TEXT: job.template.format(**row.values)}) for row in read]


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
