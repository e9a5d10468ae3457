"""From an original to plugins and their answers. Every stage is a folder, made once.

A stage that was killed goes on where it was; delete its folder to make it again.
"""

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

import variator_kernels as vk
from variator_kernels.train import DistillationConfig, DistillationTrainer, noise, rows
from variator_kernels.train.collate import batches, collator

from ..harness import results
from ..harness.results import Row
from . import originals, tasks
from .recipe import Recipe, Variant, label


@dataclass(frozen=True)
class Setup:
    """What holds for every stage of a run."""

    base: str
    """Folder of the pretrained model, or :data:`originals.SMALL_T5`."""
    data: Path
    work: Path
    recipe: Recipe
    placements: tuple[str, ...] = ("ffn",)
    keep_first: int | None = None
    """As :func:`patch` takes it."""

    @property
    def label(self) -> str:
        return label(self.placements, self.keep_first)

    @property
    def plugins(self) -> Path:
        """The folder of what is made for these placements and kept tokens; originals are whole."""
        return self.work / "plugins" / self.label

    def patch(self, model: Any, ratios: tuple[int, ...], bottleneck: int = 64) -> None:
        vk.patch(model, ratios[0], ratios, bottleneck, placements=self.placements,
                 keep_first=self.keep_first)  # fmt: skip


def original(setup: Setup, task: tasks.Task) -> tuple[Path, float]:
    """The fine-tuned model's folder, and its accuracy on the dev set."""
    return originals.original(setup.base, task, setup.data, setup.work)


def answers(setup: Setup, task: tasks.Task, variant: Variant, seed: int) -> list[Row]:
    """Loss and accuracy of a variant's plugins on the dev set, a row a ratio.

    And accuracies on the task's test set, if the data has one.
    """
    folder = _folder(setup, variant, seed, task.name)
    result = folder / "answers.json"
    splits = tasks.held_out(setup.data, task)
    if not _answered(result, splits):
        model, tokenizer = originals.read(original(setup, task)[0], task=True)
        plugins = _plugins(setup, task, variant, seed)
        _patched(setup, model, variant, seed)
        if plugins is not None:
            vk.load_plugins(model, plugins)
        several = len(variant.ratios) > 1
        config = DistillationConfig(
            output_dir=str(folder), sample_ratios=several, per_device_eval_batch_size=64,
            use_cpu=True, report_to="none",
        )  # fmt: skip
        collate = collator(tokenizer, model.config)
        trainer = DistillationTrainer(model, config, data_collator=collate)
        got: dict[str, float] = {}
        for split in splits:
            held_out, trainer.correct = tasks.load(setup.data, task, split, model, tokenizer)
            got |= trainer.evaluate(held_out, metric_key_prefix=split)
        made = []
        for k in variant.ratios:
            row = {"task": task.name, "variant": variant.name, "bottleneck": variant.bottleneck}
            row |= {"seed": seed, "k": k, "accuracy": got[f"dev_k{k}_accuracy"]}
            row |= {"loss": got[f"dev_k{k}_loss"], "dense_accuracy": got["dev_dense_accuracy"]}
            row["placements"] = list(setup.placements)
            row["test_accuracy"] = got.get(f"test_k{k}_accuracy")
            made.append(row | {"test_dense_accuracy": got.get("test_dense_accuracy")})
        folder.mkdir(parents=True, exist_ok=True)
        results.write(result, made)
    found = json.loads(result.read_text())
    answered = tuple(row["k"] for row in found)
    if answered != variant.ratios:
        raise ValueError(
            f"work holds {variant.name} of ratios {answered}, now they are {variant.ratios}: name "
            f"another folder, or delete {folder}"
        )
    return found


def _answered(result: Path, splits: list[str]) -> bool:
    """On these splits, and no others."""
    if not result.is_file():
        return False
    first = json.loads(result.read_text())[0]
    return ("test" in splits) == (first.get("test_accuracy") is not None)


def calibration(setup: Setup, task: tasks.Task, ratios: tuple[int, ...]) -> Row:
    """Seconds that ``vk.calibrate`` takes on rows of a task: a ratio, and all in one call."""
    model, tokenizer = originals.read(original(setup, task)[0], task=True)
    train, _ = tasks.load(setup.data, task, "train", model, tokenizer, setup.recipe.adapt_least)
    setup.patch(model, ratios)
    inputs = _calibration_batches(setup, model, tokenizer, train, 0)
    seconds = {}
    for some in (ratios, *((k,) for k in ratios)):
        start = time.perf_counter()
        vk.calibrate(model, inputs, some)
        seconds["all" if some is ratios else str(some[0])] = time.perf_counter() - start
    masks = [batch["attention_mask"] for batch in inputs]
    tokens = sum(int(mask.sum()) for mask in masks)
    return {"rows": sum(map(len, masks)), "tokens": tokens, "seconds": seconds}


def _plugins(setup: Setup, task: tasks.Task, variant: Variant, seed: int) -> Path | None:
    """The folder of the plugins to use on ``task``; None: initial values."""
    start = _pretrained(setup, task, variant, seed) if variant.pretrain else None
    calibrate = variant.calibrate and not variant.pretrain
    if not (variant.adapt or calibrate):
        return start
    folder = _folder(setup, variant, seed, task.name)
    if not (folder / "plugins.json").is_file():
        model, tokenizer = originals.read(original(setup, task)[0], task=True)
        least = setup.recipe.adapt_least
        train, _ = tasks.load(setup.data, task, "train", model, tokenizer, least)
        _patched(setup, model, variant, seed)
        if start is not None:
            vk.load_plugins(model, start)
        if calibrate:
            _calibrate(setup, variant, model, tokenizer, train, seed)
        if variant.adapt:
            if setup.recipe.splice:
                mixed = noise.spliced(train.rows, tokenizer, setup.recipe.splice)
                train = train.corrupted(mixed, seed)
            _train(setup, variant, seed, "adapt", model, tokenizer, train, folder)
            _train(setup, variant, seed, "finish", model, tokenizer, train, folder)
        vk.save_plugins(model, folder)
    return folder


def _pretrained(setup: Setup, task: tasks.Task, variant: Variant, seed: int) -> Path:
    """Plugins after pre-training, on the model before it saw a task."""
    scratch = setup.base == originals.SMALL_T5
    folder = _folder(setup, variant, seed, f"{task.name}-plain" if scratch else "plain")
    if not (folder / "plugins.json").is_file():
        source = original(setup, task)[0] if scratch else Path(setup.base)
        model, tokenizer = originals.read(source, task=False)
        pieces = rows.paragraphs(tasks.plain_text(setup.data), tokenizer, setup.recipe.piece)
        encoder_decoder = model.config.is_encoder_decoder
        corrupt = noise.corrupted_spans if encoder_decoder else noise.masked_tokens
        train = rows.Rows(pieces, corrupt(tokenizer), seed)
        _patched(setup, model, variant, seed)
        if variant.calibrate:
            _calibrate(setup, variant, model, tokenizer, train, seed)
        _train(setup, variant, seed, "pretrain", model, tokenizer, train, folder)
        vk.save_plugins(model, folder)
    return folder


def _calibrate(
    setup: Setup, variant: Variant, model: Any, tokenizer: Any, train: rows.Rows, seed: int
) -> None:
    inputs = _calibration_batches(setup, model, tokenizer, train, seed)
    frozen = variant.frozen
    vk.calibrate(model, inputs, merge=frozen != "merge", adapter=frozen != "adapter")


def _calibration_batches(
    setup: Setup, model: Any, tokenizer: Any, train: rows.Rows, seed: int
) -> list[Any]:
    """A sample of rows, similar lengths together, about as many tokens as the recipe says."""
    tokens = sum(len(row["input_ids"]) for row in train.rows)
    count = max(20, round(setup.recipe.calibration_tokens * len(train) / tokens))
    order = random.Random(seed).sample(range(len(train)), min(count, len(train)))
    picked = [train.draw(row, 0) for row in sorted(order)]
    return batches(picked, collator(tokenizer, model.config))


def _train(
    setup: Setup, variant: Variant, seed: int, step: str, model: Any, tokenizer: Any,
    train: rows.Rows, folder: Path,
) -> None:  # fmt: skip
    output = folder / ("finish" if step == "finish" else "run")
    options = setup.recipe.stage(step, len(train), variant)
    config = DistillationConfig(
        output_dir=str(output), seed=seed, use_cpu=True, report_to="none", **options
    )
    model.set_attn_implementation(setup.recipe.attention)
    trainer = DistillationTrainer(
        model, config, train_dataset=train, data_collator=collator(tokenizer, model.config)
    )
    for name, parameter in model.named_parameters():
        if variant.frozen and ".plugins." in name and f".{variant.frozen}." in name:
            parameter.requires_grad_(False)
    trainer.train(resume_from_checkpoint=True)


def _patched(setup: Setup, model: Any, variant: Variant, seed: int) -> None:
    set_seed(seed)
    setup.patch(model, variant.ratios, variant.bottleneck)


def _folder(setup: Setup, variant: Variant, seed: int, stage: str) -> Path:
    name = variant.name.replace(" ", "-")
    return setup.plugins / f"{name}-seed{seed}" / stage


def claim(work: Path, wanted: Row) -> None:
    """Remember the settings in the folder; ``ValueError`` if its stages were made by others."""
    path = work / "recipe.json"
    if path.is_file():
        made = json.loads(path.read_text())
        changed = [name for name in {**made, **wanted} if made.get(name) != wanted.get(name)]
        if changed:
            raise ValueError(
                f"work {work} holds stages made with another {', '.join(changed)}: name "
                "another folder, or remove it"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    results.write(path, wanted)


def settings(setup: Setup) -> Row:
    """For the result file."""
    return asdict(setup.recipe) | {"fine_tuning": originals.FINE_TUNING}
