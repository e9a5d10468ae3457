"""``python -m variator_kernels.train project``: a smaller model, from a folder and plain text."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from transformers import HfArgumentParser

from ..methods.projected.importance import KINDS
from ..methods.projected.project_model import SPLITS, STARTS
from .command import unknown_option
from .projection_config import ProjectionConfig
from .projection_run import ProjectionJob, run

STEP = "project"
EPILOG = """\
Every other option is one of ProjectionConfig's, a transformers.TrainingArguments: --learning_rate,
--projection_rate, --projection_decay, --weight_decay, --teacher_weight, --max_grad_norm,
--max_steps, --per_device_train_batch_size, --gradient_accumulation_steps, --eval_steps,
--save_steps, --seed, --bf16 and so on.
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"python -m variator_kernels.train {STEP}",
        description="Make a model smaller by Projected Compression and train it on plain text. "
        "Killed and started again, it goes on. OUTPUT/merged is the plain small model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--model", required=True, help="folder of a decoder or a T5, and its tokenizer")
    add("--data", required=True, help=".txt, .tsv, .jsonl, or name[:config[:split]] for datasets")
    add("--output", required=True, help="folder for the small model, checkpoints and metrics")
    add("--params", type=float, help="share of the parameters that stay, in (0, 1]")
    add("--hidden", type=int, help="or the hidden size; default: it stays")
    add("--ffn", type=int, help="and the FFNs' inner size; default: it stays")
    add("--start", default="pca", choices=STARTS, help="closed form (default) or hard pruning")
    add("--split", choices=SPLITS, help="of params; default: a search for the closed form")
    add("--importance", choices=KINDS, help="of dimensions; defaults as vk.project's")
    add("--calibrate", type=int, default=32, help="rows that the start looks at; default 32")
    add("--eval-data", help="like --data: evaluated during the run and at its end")
    add("--text", default="text", help="the column of the text")
    add("--max-length", type=int, help="tokens of a row (decoders 512, T5 128)")
    add("--attention", help="of transformers: eager or sdpa")
    return made


def main(words: list[str]) -> None:
    command = parser()
    given, rest = command.parse_known_args(words)
    options = HfArgumentParser(
        ProjectionConfig,  # type: ignore[arg-type]
        prog=command.prog,
        usage=command.format_usage(),
    )
    options.set_defaults(eval_strategy="steps")
    config: Any
    config, unknown = options.parse_args_into_dataclasses(
        [*rest, "--output_dir", given.output], return_remaining_strings=True
    )
    if unknown:
        command.error(unknown_option(unknown[0], command, options))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("variator_kernels").setLevel(logging.INFO)
    metrics = run(ProjectionJob(**vars(given)), config)
    if config.process_index == 0:
        for name, value in metrics.items():
            print(f"{name:<24}{value:.4g}")
