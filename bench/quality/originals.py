"""The models that plugins are made for: a pretrained one fine-tuned on a task, or a small T5."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, T5Config, set_seed

from variator_kernels.train.collate import batches, collator
from variator_kernels.train.resumable import ResumableTrainer

from ..harness import machine, results
from . import tasks

SMALL_T5 = "t5-from-scratch"
"""The name of a T5 that is made and trained here."""
T5_SIZES = {"d_model": 192, "d_ff": 768, "d_kv": 48, "num_heads": 4, "num_layers": 4}
VOCABULARY, SENTINELS = 8000, 32
FINE_TUNING: dict[str, dict[str, Any]] = {
    "sst2": {"learning_rate": 1e-4, "per_device_train_batch_size": 64, "num_train_epochs": 1,
             "warmup_steps": 60, "save_steps": 50},
    "rte": {"learning_rate": 5e-5, "per_device_train_batch_size": 16, "num_train_epochs": 5,
            "warmup_steps": 50, "save_steps": 50},
}  # fmt: skip
FROM_SCRATCH = {"learning_rate": 1e-3, "num_train_epochs": 3, "warmup_steps": 200}
LEAST = {"sst2": 8, "rte": 0}
"""Rows of fewer tokens are left out of training: SST-2 has many phrases of two or three words."""


def read(folder: Path, task: bool) -> tuple[Any, Any]:
    """A model with the head of a task, or without any, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    kind = transformers.AutoModel
    if task:
        seq2seq = AutoConfig.from_pretrained(folder, local_files_only=True).is_encoder_decoder
        kind = (
            transformers.AutoModelForSeq2SeqLM
            if seq2seq
            else transformers.AutoModelForSequenceClassification
        )
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
        settings["bf16"] = machine.bf16_pays()
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
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
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
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    start = tokenizer.pad_token_id
    size = {"vocab_size": len(tokenizer), "dropout_rate": 0.1, **T5_SIZES}
    config = T5Config(decoder_start_token_id=start, **special, **size)
    return transformers.T5ForConditionalGeneration(config), tokenizer


def words(data: Path) -> PreTrainedTokenizerFast:
    """Byte-pair encoding with T5's special tokens."""
    special = ["<pad>", "</s>", "<unk>"]
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
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


def finetune(model: Any, tokenizer: Any, train: Any, folder: Path, **settings: Any) -> None:
    """Train the whole model on its own loss; model and tokenizer end up in ``folder``.

    Goes on where it was if it was killed.
    """
    gpu = torch.cuda.is_available()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "run"), remove_unused_columns=False, report_to="none",
        use_cpu=not gpu, dataloader_pin_memory=gpu, logging_steps=50, save_total_limit=1,
        **settings,
    )  # fmt: skip
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
