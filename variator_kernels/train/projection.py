"""ProjectionTrainer: transformers.Trainer for projected models."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, TrainerCallback

from ..methods.projected import composition, cost, groups, stored
from ..methods.projected.project_model import check_projected
from . import checkpoints
from .losses import IGNORED
from .projection_config import ProjectionConfig
from .resumable import ResumableTrainer

LOG = logging.getLogger(__name__)


class ProjectionTrainer(ResumableTrainer):
    """Trains a model that :func:`project` made: ``0.5 · CE + 0.5 · KL(original || small)`` at
    temperature 1, with ``args.teacher_weight`` for the second half.

    W_C is built once an optimiser step and collects the gradients of all its batches, which go
    through the projections once (with several processes: once a batch, where gradients are
    averaged). Checkpoints hold P, A and the rest that is trained; they appear whole or not at all,
    and ``train(resume_from_checkpoint=True)`` goes on exactly where the newest one was written.

    Args:
        model: projected.
        args: a :class:`ProjectionConfig`.
        train_dataset, eval_dataset: map-style, rows of dicts with ``input_ids``; batches must have
            ``labels``, classes by number, one for each distribution that the head gives: of a row
            (``[B]``), or of each token (``[B, n]``; -100: none). A causal language model's are the
            tokens themselves, and each place answers for the next one.
        teacher: the original, which goes to the device and into evaluation. None: the loss is the
            cross-entropy alone.
        rest: as for ``transformers.Trainer``.

    Raises:
        ValueError: the model has no projections, or what is asked for is not supported.
        FloatingPointError: a loss was not finite, and the step was not taken.
    """

    args: ProjectionConfig
    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: ProjectionConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        teacher: Any = None,
        **rest: Any,
    ) -> None:
        check_projected(model, "model")
        if args.n_gpu > 1:
            raise ValueError(
                f"one process must train on one device, got {args.n_gpu}: start one process a "
                "device with torchrun or accelerate launch"
            )
        if args.fsdp or args.deepspeed:
            raise ValueError("fsdp and deepspeed must not be given: they shard P and A apart")
        for _, module in composition.composed(model):
            composition.composition_of(module).stays |= args.frozen_on_cpu
        self.teacher = None
        if teacher is not None and args.teacher_weight:
            self.teacher = teacher.eval().to(args.device)
        self.clip, args = args.max_grad_norm, copy.copy(args)
        args.max_grad_norm = 0.0  # the Trainer would clip before gradients are sent
        self.decoder_reads_labels = bool(getattr(model.config, "is_encoder_decoder", False))
        """Whether its inputs are made of them."""
        # Only a causal language model's label stands one place behind what predicts it.
        self.shifts = isinstance(model, GenerationMixin) and not self.decoder_reads_labels
        super().__init__(
            model,
            args,
            train_dataset,
            group=args.group_by_length,
            eval_dataset=eval_dataset,
            **rest,
        )
        self.model_accepts_loss_kwargs = True  # losses are shares of one mean: nothing to divide
        self.add_callback(_Sending(self))

    @property
    def collects(self) -> bool:
        """Whether W_C collects: with several processes its gradients would not be averaged."""
        return self.args.world_size == 1

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.report()
        with composition.collecting(self.model) if self.collects else nullcontext():
            return super().train(*args, **kwargs)

    def report(self) -> cost.Cost:
        """Log what a step trains and takes."""
        found = cost.counted(self.model, self._tokens(), self.teacher)
        LOG.warning("%s", found)
        if found.share > cost.WARNED:
            LOG.warning(
                "building weights is more than %.0f %% of a step: put more tokens into one, with "
                "gradient_accumulation_steps",
                100 * cost.WARNED,
            )
        return found

    def _tokens(self) -> float:
        rows: Any = self.train_dataset
        if rows is None:
            return 0.0
        seen = range(0, len(rows), max(1, len(rows) // 64))
        mean = sum(len(rows[i]["input_ids"]) for i in seen) / len(seen)
        args = self.args
        return mean * args.per_device_train_batch_size * args.gradient_accumulation_steps

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            own = self.args
            kind, settings = self.get_optimizer_cls_and_kwargs(own, self.model)
            made = groups.parameter_groups(
                self.model,
                own.learning_rate,
                own.projection_rate,
                own.weight_decay,
                own.projection_decay,
            )
            self.optimizer = kind(made, **settings)
        return self.optimizer

    def before_step(self) -> None:
        """Gradients reach P and A, and are scaled where the compressed one is too long: that of A
        is the gradient of W_C, and P's are linear in it."""
        composition.send(self.model)
        projections = {id(p) for p in groups.projections(self.model)}
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        compressed = [p.grad for p in parameters if id(p) not in projections]
        norm = torch.nn.utils.get_total_norm(compressed)  # type: ignore[arg-type]
        if not bool(torch.isfinite(norm)):
            self._not_finite(f"the gradient of step {self.state.global_step}")
        if self.clip and norm > self.clip:
            for parameter in parameters:
                parameter.grad.mul_(self.clip / norm)  # type: ignore[union-attr]

    # The loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one step, and how many labels they hold over all devices."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        size = torch.stack([self._labels(batch).ne(IGNORED).sum() for batch in batches]).sum()
        return batches, self.accelerator.reduce(size.to(self.args.device), "sum")

    def _labels(self, batch: Mapping[str, Any]) -> Tensor:
        labels: Tensor | None = batch.get("labels")
        if labels is None:
            raise ValueError(f"batches must have labels, got {sorted(batch)}")
        if labels.is_floating_point():
            raise ValueError(f"labels must be integers, classes by number, got {labels.dtype}")
        if self.shifts and labels.dim() != 2:
            raise ValueError(f"labels must be one for each token, [B, n], got {list(labels.shape)}")
        return labels[:, 1:] if self.shifts else labels

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        labels = self._labels(inputs)
        counted = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        with self.compute_loss_context_manager():
            entropy, divergence, outputs = self._sums(model, inputs)
        weight = 0.0 if self.teacher is None else self.args.teacher_weight
        loss = ((1 - weight) * entropy + weight * divergence) / counted.clamp_min(1)
        if not bool(torch.isfinite(loss)):
            self._not_finite(f"the loss of step {self.state.global_step}")
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # whose gradients will be averaged
        return (loss, outputs) if return_outputs else loss

    def _sums(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        """Cross-entropy and divergence, summed over labels."""
        labels = self._labels(inputs)
        real = labels != IGNORED
        given = dict(inputs)
        if not self.decoder_reads_labels:
            del given["labels"]
        outputs = model(**given)

        def logs(logits: Tensor) -> Tensor:
            logits = logits[:, :-1] if self.shifts else logits
            if logits.shape[:-1] != labels.shape:
                raise ValueError(
                    f"labels must be one for each distribution, {list(logits.shape[:-1])}, got "
                    f"{list(labels.shape)}"
                )
            return logits[real].float().log_softmax(-1)

        ours = logs(outputs.logits)
        entropy = F.nll_loss(ours, labels[real], reduction="sum")
        if self.teacher is None:
            return entropy, entropy.new_zeros(()), outputs
        with torch.no_grad():
            theirs = logs(self.teacher(**given).logits)
        return entropy, F.kl_div(ours, theirs, reduction="sum", log_target=True), outputs

    def _not_finite(self, what: str) -> None:
        kept = checkpoints.last(str(self.args.output_dir))
        raise FloatingPointError(
            f"{what} is not finite, the newest checkpoint is {kept or 'none'}: lower the learning "
            "rate, or look for non-finite weights and inputs"
        )

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """``eval_loss``, the mean of what is trained; ``eval_perplexity``; with a teacher
        ``eval_divergence``."""
        loader = self.get_eval_dataloader(eval_dataset)
        training = self.model.training
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for inputs in loader:
            batch = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                entropy, divergence, _ = self._sums(self.model, batch)
            count = (self._labels(batch) != IGNORED).sum()
            sums += torch.stack([entropy.double(), divergence.double(), count.double()])
        self.model.train(training)
        entropy, divergence, count = self.accelerator.reduce(sums, "sum").tolist()
        weight = 0.0 if self.teacher is None else self.args.teacher_weight
        entropy, divergence = entropy / max(count, 1), divergence / max(count, 1)
        prefix = metric_key_prefix
        metrics = {f"{prefix}_loss": (1 - weight) * entropy + weight * divergence}
        metrics[f"{prefix}_perplexity"] = math.exp(min(entropy, 700))
        if self.teacher is not None:
            metrics[f"{prefix}_divergence"] = divergence
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write P, A and what else is trained; :func:`merge` makes the small model of it."""
        if self.args.should_save:
            stored.save(self.model, output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stored.load(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        stored.load(self.model, str(self.state.best_model_checkpoint))


class _Sending(TrainerCallback):
    """The Trainer calls this when all batches of a step have run."""

    def __init__(self, trainer: ProjectionTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.before_step()
