"""A decoder that answers a classification task: the task as prompts, fine-tuning, plugins for it.

Every stage is a folder, made once; one that was killed goes on where it was.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import set_seed

from variator_kernels.train import DistillationConfig, Job, data, prompts, rows
from variator_kernels.train.run import run

from ..cases.models import Architecture
from ..quality import originals, tasks
from ..quality.recipe import Shortened
from . import setup
from .levels import Level

PROMPT = "Review: {sentence}\nSentiment:"
LABELS = ("negative", "positive")
TASK = tasks.TASKS["sst2"]
WHOLE = "complete"
"""An empty file in the folder of a fine-tuned model, written last."""
ROWS = 32
"""Of a batch of prompts; rows of similar length share one."""


@dataclass(frozen=True)
class Recipe(Shortened):
    """Lengths and rates of fine-tuning and of the plugins' training."""

    tune_steps: int = 600
    tune_rate: float = 3e-5
    tune_batch: int = 32
    least: int = 8
    """Sentences of fewer tokens are left out of fine-tuning."""
    calibration_rows: int = 1500
    adapt_steps: int = 600
    batch: int = 16
    rate: float = 1e-3
    layer_weight: float = 0.3
    logits_weight: float = 1.0
    bf16: bool = False


class Questions(NamedTuple):
    """Prompts, and the token that answers each."""

    prompts: list[list[int]]
    answers: list[int]

    def batches(self, pad: int) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Inputs padded on the left, as ``generate()`` passes them, and the right tokens."""
        order, made = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i])), []
        for start in range(0, len(order), ROWS):
            some = order[start : start + ROWS]
            width = max(len(self.prompts[i]) for i in some)
            empty = [width - len(self.prompts[i]) for i in some]
            ids = [[pad] * n + self.prompts[i] for n, i in zip(empty, some, strict=True)]
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in empty])
            inputs = {"input_ids": torch.tensor(ids), "attention_mask": mask}
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
            made.append((inputs, torch.tensor([self.answers[i] for i in some])))
        return made


def examples(folder: Path, split: str, tokenizer: Any, least: int = 0) -> list[dict[str, Any]]:
    """Prompts with answers, as :func:`prompts.answered` makes them."""
    read = data.read(str(folder / getattr(TASK, split)), (*TASK.text, "label"))
    answers = prompts.answers_of(read, "label", LABELS)
    read = [data.Row(row.place, {data.TEXT: PROMPT.format(**row.values)}) for row in read]
    made = prompts.answered(read, answers, tokenizer, None, None)
    return [row for row in made if len(row["input_ids"]) >= least]


def questions(made: list[dict[str, Any]]) -> Questions:
    """``ValueError`` if the labels do not begin with one token each."""
    found = Questions([], [])
    for row in made:
        begin = next(i for i, label in enumerate(row["labels"]) if label >= 0)
        found.prompts.append(row["input_ids"][:begin])
        found.answers.append(row["labels"][begin])
    if len({*found.answers}) != len(LABELS):
        raise ValueError(
            f"labels {LABELS} must begin with {len(LABELS)} tokens, they begin with "
            f"{sorted({*found.answers})}"
        )
    return found


def answered_right(model: Any, batches: list[tuple[dict[str, Tensor], Tensor]]) -> float:
    """Share of prompts behind which the right label is the likeliest of them."""
    choices = torch.cat([right for _, right in batches]).unique()
    right = 0
    for inputs, wanted in batches:
        right += int((choices[ask(model, inputs)[:, choices].argmax(-1)] == wanted).sum())
    return right / sum(len(wanted) for _, wanted in batches)


@torch.no_grad()
def ask(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the next token: a whole prefill, with its cache, as ``generate()`` begins."""
    found: Tensor = model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
    return found


def original(base: Architecture, folder: Path, source: Path, recipe: Recipe) -> Path:
    """The folder of ``base`` fine-tuned on the task, all of its weights."""
    made = folder / "original"
    if not (made / WHOLE).is_file():
        set_seed(0)
        tokenizer, model = setup.tokenizer(base), setup.load(base, torch.float32)
        model.requires_grad_(True)
        train = rows.Rows(examples(source, "train", tokenizer, _least(tokenizer, recipe)))
        originals.finetune(
            model, tokenizer, train, made, max_steps=recipe.tune_steps, bf16=recipe.bf16,
            per_device_train_batch_size=recipe.tune_batch, learning_rate=recipe.tune_rate,
            warmup_steps=recipe.tune_steps // 10, save_steps=100,
        )  # fmt: skip
        (made / WHOLE).touch()
    return made


def plugins(folder: Path, source: Path, level: Level, seed: int, recipe: Recipe) -> Path:
    """The folder of plugins for this level of the fine-tuned model in ``folder``."""
    name = str(level).replace(" ", "_").replace("/", "-")
    made = folder / "plugins" / f"{name}-seed{seed}"
    model = folder / "original"
    layers = setup.architecture(str(model)).config.num_hidden_layers
    job = Job(
        "adapt", str(model), str(source / TASK.train), str(made), level=level.ratio(layers),
        calibrate=recipe.calibration_rows * ("ffn" in level.where), template=PROMPT, labels=LABELS,
        window=level.window, attention="sdpa",
    )  # fmt: skip
    config = DistillationConfig(
        output_dir=str(made), seed=seed, use_cpu=not torch.cuda.is_available(), report_to="none",
        max_steps=recipe.adapt_steps, warmup_steps=recipe.adapt_steps // 20,
        learning_rate=recipe.rate, lr_scheduler_type="linear",
        per_device_train_batch_size=recipe.batch,
        layer_weight=recipe.layer_weight, logits_weight=recipe.logits_weight, bf16=recipe.bf16,
        eval_strategy="no", save_steps=100, logging_steps=100,
    )  # fmt: skip
    run(job, config)
    return made


def _least(tokenizer: Any, recipe: Recipe) -> int:
    """Tokens of the shortest row: so many of the sentence, and what stands around it."""
    around = PROMPT.format(sentence="") + " " + LABELS[0]
    return recipe.least + len(tokenizer(around)["input_ids"])
