"""The one trainer of all methods: the same rows in the same order, the same loss and steps."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainingArguments

from variator_kernels.train import losses
from variator_kernels.train.resumable import ResumableTrainer

from .. import internals

WEIGHTS = "weights.safetensors"


class Weights(NamedTuple):
    """Of the parts of the loss: hidden states (the last; the others' mean), the original's
    distribution, and labels."""

    hidden: float = 0.0
    layers: float = 0.0
    logits: float = 0.0
    labels: float = 0.0


def loss(ours: Any, theirs: Any, batch: Any, weights: Weights, model: Any) -> Tensor:
    """What a step minimises; ``theirs`` is the original's output."""
    labels, a, b = batch["labels"], ours.logits, theirs.logits
    if a.dim() == 3:  # of the next token
        a, b, labels = (part.flatten(0, 1) for part in (a[:, :-1], b[:, :-1], labels[:, 1:]))
    logs = a.float().log_softmax(-1)
    total = weights.labels * F.nll_loss(logs, labels)
    if weights.logits:
        apart = F.kl_div(logs, b.float().log_softmax(-1), reduction="batchmean", log_target=True)
        total = total + weights.logits * apart
    if weights.hidden:
        matched = getattr(model, "matched", range(len(theirs.hidden_states)))
        states = [ours.hidden_states, [theirs.hidden_states[i] for i in matched]]
        seen = dict(batch)
        if not getattr(model, "aligned", True):  # the first token is where it was
            states = [[state[:, :1] for state in some] for some in states]
            seen["attention_mask"] = batch["attention_mask"][:, :1]
        student, teacher = (_States(some) for some in states)
        layers, count = weights.layers / weights.hidden, losses.counts(seen)
        apart = losses.distillation(student, teacher, seen, count, layers)
        total = total + weights.hidden * apart
    return total if ours.loss is None else total + ours.loss


class _States(NamedTuple):
    hidden_states: Any


class MethodTrainer(ResumableTrainer):
    """Trains what gets gradients. Checkpoints hold that alone, under the model's names.

    Args:
        teacher: the original.
        weights: of the loss.
        rest: as for :class:`ResumableTrainer`.
    """

    optimizer: Any

    def __init__(self, model: Any, args: Any, rows: Any, teacher: Any, weights: Weights,
                 **rest: Any) -> None:  # fmt: skip
        self.teacher, self.weights = teacher, weights
        super().__init__(model, args, rows, **rest)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(
                groups(self.model, self.args.learning_rate), **settings | {"weight_decay": 0.0}
            )
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:  # fmt: skip
        model.eval()  # no dropout, for nobody
        if hasattr(self.model, "progress"):
            self.model.progress = self.state.global_step / self.state.max_steps
        given = losses.without_labels(inputs)
        hidden = {"output_hidden_states": True} if self.weights.hidden else {}
        with torch.no_grad():
            theirs = self.teacher(**given, **hidden)
        found = loss(model(**given, **hidden), theirs, inputs, self.weights, self.model)
        if not bool(found.isfinite()):
            raise FloatingPointError(f"the loss of step {self.state.global_step} is {found.item()}")
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        save(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load(self.model, Path(resume_from_checkpoint))


def groups(model: Any, rate: float) -> list[dict[str, Any]]:
    """For an optimizer, without weight decay."""
    if internals.is_projected(model):  # matrices that keep their size are a whole model's
        found, own = internals.parameter_groups(model, rate), set(internals.additions(model))
        kept = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]
        kept = [p for p in kept if p not in own | set(internals.projections(model))]
        for group in found:
            group["params"] = [p for p in group["params"] if not any(p is q for q in kept)]
        return [g for g in (*found, {"params": kept, "lr": rate / 10}) if g["params"]]
    if hasattr(model, "parameter_groups"):
        return model.parameter_groups(rate)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}]


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{WEIGHTS}.part"
    save_file({name: p.detach().contiguous() for name, p in trained(model).items()}, part)
    part.replace(folder / WEIGHTS)


@torch.no_grad()
def load(model: Any, folder: Path) -> None:
    """Raises ``ValueError`` if they are another model's."""
    found, own = load_file(folder / WEIGHTS), trained(model)
    if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in found.items()}:
        raise ValueError(f"{folder} must hold weights of this model: remove it to make them again")
    for name, parameter in own.items():
        parameter.copy_(found[name])


def fit(model: Any, folder: Path, task: Any, weights: Weights, seed: int, **settings: Any) -> None:
    """Train ``model`` in place, or load what was trained in ``folder``; nothing for no steps. A run
    that was killed goes on where it was."""
    if not settings["max_steps"]:
        return
    if not (folder / WEIGHTS).is_file():
        given: dict[str, Any] = {
            "output_dir": str(folder / "run"), "seed": seed, "use_cpu": True, "report_to": "none",
            "remove_unused_columns": False, "dataloader_pin_memory": False, "save_total_limit": 1,
            "lr_scheduler_type": "linear", "warmup_steps": min(30, settings["max_steps"] // 5),
            "max_grad_norm": 1.0, "logging_steps": 50, "save_steps": 200, "disable_tqdm": True,
        }  # fmt: skip
        arguments = TrainingArguments(**given | settings)
        trainer = MethodTrainer(
            model, arguments, task.train, task.model, weights, data_collator=task.collate
        )
        trainer.train(resume_from_checkpoint=True)
        save(model, folder)
        shutil.rmtree(folder / "run", ignore_errors=True)
    load(model, folder)
