"""``python -m variator_kernels.train pretrain|adapt``, and ``project``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from typing import Any

from transformers import HfArgumentParser

from . import projection_command
from .command import own_group, unknown_option
from .config import STEP_DEFAULTS, STEPS, DistillationConfig
from .job import Job
from .run import run

EPILOG = """\
Every other option is one of DistillationConfig's, a transformers.TrainingArguments:
--learning_rate, --max_steps, --per_device_train_batch_size, --eval_steps, --save_steps, --seed,
--bf16, --task_weight, --layer_weight, --logits_weight, --embedding_weight and so on. Start several
processes with torchrun or accelerate launch. A smaller model by Projected Compression is trained by
"python -m variator_kernels.train project", which has a --help of its own.
"""


def _integers(words: list[str], name: str, least: int) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(word) for text in words for word in text.split(",") if word}))
    except ValueError:
        got = " ".join(words)
        raise ValueError(f"{name} must be integers >= {least}, got {got!r}") from None


def _level(text: str) -> dict[str, Any]:
    try:
        level = json.loads(text)
    except json.JSONDecodeError:
        level = None
    if not isinstance(level, dict) or not level:
        raise argparse.ArgumentTypeError(
            f'must be a JSON object of placements, such as {{"ffn": 4}}, got {text}'
        )
    return level


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m variator_kernels.train",
        description="Train compression plugins for a model. Killed and started again, it goes on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add(
        "step",
        metavar="|".join(STEPS),
        choices=STEPS,
        help="pretrain on plain text, or adapt to a task",
    )
    add(
        "--model",
        required=True,
        help="folder of a Hugging Face model and its tokenizer; or of sentence-transformers",
    )
    add("--data", required=True, help=".txt, .tsv, .jsonl, or name[:config[:split]] for datasets")
    add("--output", required=True, help="folder for plugins, checkpoints and metrics")
    add("--ratios", nargs="+", default=[], help="k, one or more; default: those of --plugins, or 4")
    add(
        "--placements",
        nargs="+",
        default=[],
        help="ffn, attention_kv, attention; default: those of --plugins, or ffn",
    )
    add(
        "--level",
        type=_level,
        help="JSON instead of --ratios and --placements, this one level is trained: "
        '\'{"ffn": 4, "attention_kv": 2}\', or {"ffn": {"-1": 4}} for layers',
    )
    add(
        "--plan",
        nargs="+",
        dest="plans",
        metavar="FILE",
        help="instead of these three: files that Plan.save wrote, whose levels are all trained",
    )
    add("--eval-data", help="like --data: evaluated during the run and at its end")
    add("--plugins", help="folder of plugins to start from")
    add(
        "--calibrate", type=int, default=0, help="rows to calibrate on first, 10 or more; default 0"
    )
    add("--bottleneck", type=int, help="r; default: that of --plugins, or 64")
    add("--activation", help="tanh or identity; default: that of --plugins, or tanh")
    add("--keep-first", type=int, help="so many first tokens stay whole; default: as --plugins")
    add("--keep-last", type=int, help="the same for last tokens; default: those of --plugins, or 0")
    add("--keep", nargs="*", help="ids of tokens that stay whole; default: those of --plugins")
    add("--window", type=int, help="decoders: so many last keys stay plain; default: 64")
    add(
        "--continuation",
        type=int,
        help="decoders' pretrain: so many last tokens of a row count; default: all of them, a "
        "quarter where ffn is trained",
    )
    add("--backend", default="auto", help="auto (default), or one of the package's backends")
    add(
        "--text",
        default="",
        help="the column of the text (pretrain: text, adapt: sentence); adapt "
        "takes two with a comma",
    )
    add("--label", default="label", help="the column of the label")
    add("--labels", default="", help="names of the labels, with commas, if the model has none")
    add("--template", help='one text of several columns: "sst2 sentence: {sentence}"')
    add(
        "--max-length",
        type=int,
        help="tokens of a piece (pretrain: 128, decoders 512), or to cut to",
    )
    add("--splice", type=float, default=0.0, help="part of rows mixed with another; 0 to 1")
    add(
        "--noise", default="default", help="pretrain: default (masks, spans; decoders none) or none"
    )
    add("--vary-lengths", action="store_true", help="pretrain: pieces of 8 to --max-length tokens")
    add("--attention", help="of transformers: eager (on a CPU in bf16 the faster) or sdpa")
    return made


@own_group()
def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == [projection_command.STEP]:
        projection_command.main(words[1:])
        return
    command = parser()
    given, rest = command.parse_known_args(words)
    options = HfArgumentParser(DistillationConfig, prog=command.prog, usage=command.format_usage())
    options.set_defaults(**STEP_DEFAULTS[given.step], eval_strategy="steps")
    config: Any
    config, unknown = options.parse_args_into_dataclasses(
        [*rest, "--output_dir", given.output], return_remaining_strings=True
    )
    if unknown:
        command.error(unknown_option(unknown[0], command, options))
    values = vars(given)
    values["text"] = tuple(name for name in given.text.split(",") if name)
    values["labels"] = tuple(name for name in given.labels.split(",") if name)
    words = [word for text in given.placements for word in text.split(",") if word]
    values["placements"] = tuple(words)
    values["plans"] = None if given.plans is None else tuple(given.plans)
    values["ratios"] = _integers(given.ratios, "ratios", 2)
    if given.keep is not None:
        values["keep"] = _integers(given.keep, "keep", 0)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("variator_kernels").setLevel(logging.INFO)
    metrics = run(Job(**values), config)
    if config.process_index == 0:
        for name, value in metrics.items():
            print(f"{name:<24}{value:.4g}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
