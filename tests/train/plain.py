"""A plain Trainer of a patched model, small enough for a test."""

import torch
import transformers
from transformers import Trainer, TrainingArguments

import variator_kernels as vk
from tests.sites import tiny

FILES = {"plugins.json", "plugins.safetensors"}


def classifier():
    return tiny.model("bert", "gelu", head="ForSequenceClassification", num_labels=2)


def rows(number=16):
    ids, mask = tiny.batch(*[6 + i % 4 for i in range(number)], width=9)
    labels = [i % 2 for i in range(number)]
    return [
        {"input_ids": i, "attention_mask": m, "labels": y}
        for i, m, y in zip(ids, mask, labels, strict=True)
    ]


def values(model):
    return [p.detach().clone() for p in vk.plugin_parameters(model)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def arguments(folder, **settings):
    given = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 0.1}
    given |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    return TrainingArguments(str(folder), **given | settings)


def trainer(folder, bottleneck=6, **settings):
    """A plain Trainer of a patched model whose base is frozen."""
    model = classifier().requires_grad_(False)
    vk.patch(model, ratio=2, ratios=(2,), bottleneck=bottleneck)
    return Trainer(model, arguments(folder, **settings), train_dataset=rows(), eval_dataset=rows())


def keeps(made, step):
    """The plugins of each step."""
    kept = {}

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **rest):
            kept[state.global_step] = values(model)

    made.add_callback(Keep())
    made.train(**step)
    return kept
