"""The models that plugins are made for: a pretrained one fine-tuned on a task, or a small T5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from ..harness import machine, results
from . import tasks
from .finetune import accuracy, finetune

SMALL_T5 = "t5-from-scratch"
"""The name of a T5 that is made and trained here."""
T5_SIZES = {"d_model": 192, "d_ff": 768, "d_kv": 48, "num_heads": 4, "num_layers": 4}
VOCABULARY, SENTINELS = 8000, 32
FINE_TUNING: dict[str, dict[str, Any]] = {
    "sst2": {
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 64,
        "num_train_epochs": 1,
        "warmup_steps": 60,
        "save_steps": 50,
    },
    "rte": {
        "learning_rate": 5e-5,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 5,
        "warmup_steps": 50,
        "save_steps": 50,
    },
}
FROM_SCRATCH = {"learning_rate": 1e-3, "num_train_epochs": 3, "warmup_steps": 200}
LEAST = {"sst2": 8, "rte": 0}
"""Rows of fewer tokens are left out of training: SST-2 has many phrases of two or three words."""


def read(folder: Path, task: bool) -> tuple[Any, Any]:
    """A model with the head of a task, or without any, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    kind = AutoModel
    if task:
        seq2seq = AutoConfig.from_pretrained(folder, local_files_only=True).is_encoder_decoder
        kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), tokenizer


def original(base: str, task: tasks.Task, data: Path, work: Path) -> tuple[Path, float]:
    """The folder of ``base`` fine-tuned on ``task``, and its accuracy on the dev set."""
    folder = work / task.name / "original"
    result = folder / "accuracy.json"
    if not result.is_file():
        set_seed(0)
        scratch = base == SMALL_T5
        model, tokenizer = small_t5(data) if scratch else with_head(Path(base), task)
        settings = FINE_TUNING[task.name] | (FROM_SCRATCH if scratch else {})
        settings["bf16"] = machine.has_bf16()
        train, _ = tasks.load(data, task, "train", model, tokenizer, LEAST[task.name])
        finetune(model, tokenizer, train, folder, **settings)
        model, tokenizer = read(folder, task=True)  # what training left computes in its precision
        dev, correct = tasks.load(data, task, "dev", model, tokenizer)
        results.write(result, {"accuracy": accuracy(model, tokenizer, dev, correct)})
    return folder, json.loads(result.read_text())["accuracy"]


def with_head(folder: Path, task: tasks.Task) -> tuple[Any, Any]:
    """A pretrained model with a new classifier, or an encoder-decoder as it is."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if config.is_encoder_decoder:
        return read(folder, task=True)
    names = dict(enumerate(task.labels))
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        local_files_only=True,
        dtype=torch.float32,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    return model, tokenizer


def small_t5(data: Path) -> tuple[Any, Any]:
    """A random T5 and a tokenizer made from the training text."""
    tokenizer = words(data)
    config = T5Config(
        vocab_size=len(tokenizer),
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dropout_rate=0.1,
        **T5_SIZES,
    )
    return T5ForConditionalGeneration(config), tokenizer


def words(data: Path) -> PreTrainedTokenizerFast:
    """Byte-pair encoding with T5's special tokens."""
    special = ["<pad>", "</s>", "<unk>"]
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False
    )
    sources = [tasks.TASKS["sst2"].train, *tasks.PLAIN_TEXT]
    made.train([str(data / name) for name in sources], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
        model_input_names=["input_ids", "attention_mask"],
    )
