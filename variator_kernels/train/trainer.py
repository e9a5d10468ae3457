"""DistillationTrainer: transformers.Trainer, with a model's plugins as what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import backends, checkpoint, sharding
from ..checkpoint import load_plugins
from ..methods.variator.method import level_parameters
from ..ops import prepack
from ..ops.int8_linear import own_precision
from ..ops.prepacked_linear import FrozenProducts
from ..runtime.state import states
from . import checkpoints, evaluation, losses, turns
from .config import DistillationConfig
from .decoders import DecoderObjective, has_decoder, weighs_tokens
from .embeddings import Pooler
from .evaluation import Correct
from .objective import Objective
from .resumable import ResumableTrainer


class DistillationTrainer(ResumableTrainer):
    """Trains the plugins of a patched model to make up for what compression changes.

    The teacher is the same model at ratio 1, without gradients and dropout: no second copy. Only
    plugins get gradients: those of every ratio in turn with ``args.sample_ratios``, at every
    placement that has it, or of ``levels`` in turn, else those of the model's active level.
    Checkpoints hold the plugins alone (:func:`load_plugins` reads them), appear whole or not at
    all, and ``train(resume_from_checkpoint=True)`` goes on exactly where the newest one was
    written, or starts if there is none.

    Args:
        model: patched, of any head; its base parameters are frozen here.
        args: a :class:`DistillationConfig`.
        train_dataset, eval_dataset: map-style, rows of dicts with ``input_ids``.
        correct: for an accuracy beside the loss, see :data:`~.evaluation.Correct`.
        pooler: for ``embedding_weight``, and cosines beside the loss, see :class:`~.Pooler`.
        levels: what is trained in turn instead of ratios: by the names that metrics will have, as
            :func:`set_ratio` takes them, plans for instance.
        rest: as for ``transformers.Trainer``.

    Raises:
        ValueError: the model is not patched, there is nothing to train at its ratio, or
        ``embedding_weight`` has no ``pooler``.
        FloatingPointError: a loss was not finite, and the step was not taken; or the plugins were
            not, and no checkpoint was written.
    """

    args: DistillationConfig

    def __init__(
        self,
        model: Any,
        args: DistillationConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        correct: Correct | None = None,
        pooler: Pooler | None = None,
        levels: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        (state,) = states(model)
        self.turns = turns.Turns(state, args, levels)
        self.levels, self.ratios = self.turns.levels, self.turns.names
        if args.n_gpu > 1:
            raise ValueError(
                f"one process must train on one device, got {args.n_gpu}: start one process a "
                "device with torchrun or accelerate launch"
            )
        if args.embedding_weight and pooler is None:
            raise ValueError(f"embedding_weight needs a pooler, got {args.embedding_weight} alone")
        self.correct = correct
        self.pooler = None if pooler is None else pooler.to(args.device)
        kind = DecoderObjective if has_decoder(model) else Objective
        self.objective = kind(model, args, self.pooler)
        self.plugin_state = state
        self.whole = self.learned = False
        self._keep_quiet()
        model.requires_grad_(False)
        self.trained = level_parameters(model, self.levels.values())
        for parameter in self.trained:
            parameter.requires_grad_(True)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = self.turns.take_turns
        super().__init__(
            model,
            args,
            train_dataset,
            group=args.group_by_length,
            eval_dataset=eval_dataset,
            **rest,
        )
        sharder = getattr(self.accelerator.state, "fsdp_plugin", None)
        if sharder is not None and sharder.fsdp_version != 2:
            raise ValueError(
                f"fsdp_config must have version 2, which leaves modules what they are, got version "
                f"{sharder.fsdp_version}"
            )
        head = getattr(model, "get_output_embeddings", lambda: None)()
        # A language model's head is the largest weight of all, and these alone need it.
        unused = () if has_decoder(model) and weighs_tokens(args) else (head,)
        self.frozen = FrozenProducts(model, [layer.weight for layer in unused if layer is not None])
        # Gradients of accumulated batches are sums of shares of one mean: nothing to divide.
        self.model_accepts_loss_kwargs = True

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        made = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not made and self.args.key_rate != 1:
            keys = level_parameters(self.model, self.turns.of_placement("attention_kv"))
            turns.scale_rate(optimizer, keys, self.args.key_rate)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.whole = self.learned = False
        try:
            done = super().train(*args, **kwargs)
        finally:
            prepack.cache.forget(self.model.parameters())
        if self.whole and not self.learned:
            raise ValueError(
                "nothing was trained, in no step did any row have a complete group: take longer "
                "rows, a smaller ratio, or a smaller window"
            )
        return done

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._products(), own_precision():
            return super().training_step(*args, **kwargs)

    def _products(self) -> AbstractContextManager[Any]:
        """How the base model's own products run: packed, beside the CPU's kernels."""
        args = self.args
        packed = args.packed_products and not (args.torch_compile or self.is_fsdp_enabled)
        backend = self.plugin_state.method.config.backend
        if not packed or backends.resolve(backend, self.trained[0]) != "cpu":
            return nullcontext()
        return self.frozen

    # The loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one step, and how many tokens they hold over all devices."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        size = torch.stack([self.objective.counts(batch) for batch in batches]).sum(0)
        return batches, self.accelerator.reduce(size.to(self.args.device), "sum")

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        total = self.objective.counts(inputs) if num_items_in_batch is None else num_items_in_batch
        teacher = self._teacher(model, inputs)
        loss = torch.zeros((), device=total.device)
        for ratio in self.turns.at(self.state.global_step):
            student = self._student(model, inputs, ratio)
            share = self.objective.distance(student, teacher, inputs, total)
            self._check(share, ratio)
            loss = loss + share
        if torch.is_grad_enabled():
            loss = self._learning(loss)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # whose gradients will be averaged
        return (loss, student) if return_outputs else loss

    def _learning(self, loss: Tensor) -> Tensor:
        """The loss of a step with something to learn from: some group was complete."""
        self.whole |= self.state.global_step == 0  # and does not go on from a checkpoint
        self.learned |= loss.requires_grad
        if loss.requires_grad:
            return loss
        what = "no row of a step had a complete group: leave out rows that are that short"
        if self.accelerator.num_processes > 1:  # the others wait for this one's gradients
            raise ValueError(f"{what}, or train in one process")
        names = self.turns.at(self.state.global_step)
        trained = level_parameters(self.model, [self.levels[name] for name in names])
        return loss + 0.0 * torch.stack([p.sum() for p in trained]).sum().to(loss)

    def _check(self, loss: Tensor, ratio: int | str) -> None:
        if not bool(torch.isfinite(loss)):
            self._not_finite(
                f"the loss of step {self.state.global_step} (ratio {ratio}) is {loss.item()}; its "
                "gradient was not used"
            )

    def _not_finite(self, what: str) -> NoReturn:
        kept = checkpoints.last(self.args.output_dir)
        raise FloatingPointError(
            f"{what}, the newest checkpoint is {kept or 'none'}: lower the learning rate, or look "
            "for non-finite weights and inputs"
        )

    def _teacher(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        if self.is_fsdp_enabled:
            losses.record_hidden_states(self.model)
        with self.compute_loss_context_manager():
            return self.objective.teacher(model, inputs)

    def _student(self, model: Any, inputs: Mapping[str, Any], ratio: int | str) -> Any:
        with self.compute_loss_context_manager():
            return self.objective.student(model, inputs, self.levels[ratio])

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss, accuracy and cosine of every trained ratio, means over tokens and rows.

        Returns:
            ``eval_k4_loss``, ``eval_k4_accuracy``, ``eval_k4_cosine`` and so on,
            ``eval_dense_accuracy``, and ``eval_loss``, the mean over ratios; of a decoder
            ``eval_dense_perplexity``, ``eval_k4_perplexity`` and ``eval_k4_divergence`` as well.
        """
        with own_precision():
            return self._metrics_over(eval_dataset, metric_key_prefix)

    def _metrics_over(self, eval_dataset: Any, metric_key_prefix: str) -> dict[str, float]:
        loader = self.get_eval_dataloader(eval_dataset)
        self.callback_handler.eval_dataloader = loader
        rows = []
        for inputs in loader:
            rows.append(self._rows_of(self._prepare_inputs(inputs)))
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        sums = {name: sum(float(row[name].double().sum()) for row in rows) for name in rows[0]}
        names = map(evaluation.name_of, self.ratios)
        metrics = evaluation.metrics(sums, names, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _rows_of(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        model = self.model_wrapped
        teacher = self._teacher(model, inputs)
        students = (
            (evaluation.name_of(ratio), self._student(model, inputs, ratio))
            for ratio in self.ratios
        )
        found = evaluation.rows(self.objective, teacher, students, inputs, self.correct)
        found = self.accelerator.gather_for_metrics(found)
        return {name: values.cpu() for name, values in found.items()}

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # A finite loss can have a gradient that is not; the next loss would tell, a save too late.
        sharding.reshard(self.model)
        trained = level_parameters(self.model, self.levels.values())
        if not all(sharding.whole(p).isfinite().all() for p in trained):
            self._not_finite(f"the plugins after step {self.state.global_step - 1} are not finite")
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the plugins, not the model. Every process must call it; one writes."""
        settings, tensors = checkpoint.gather(self.model)
        if self.args.should_save:
            checkpoint.write(settings, tensors, output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Plugins", revision=self.args.hub_revision)

    def _keep_quiet(self) -> None:
        """That the plugins trained here are untrained at first is no news."""
        for level in self.levels.values():
            self.plugin_state.quiet |= self.plugin_state.plugins_of(level)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_plugins(self.model, resume_from_checkpoint)
        self._keep_quiet()

    def _load_best_model(self) -> None:
        load_plugins(self.model, str(self.state.best_model_checkpoint))
