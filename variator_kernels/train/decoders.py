"""What training a decoder-only model (LLaMA and relatives) does otherwise.

A row is a prompt and an answer, or plain text. Its tokens that have a label are the ones whose
probability counts: all of plain text, the answer of a prompt. Where ``ffn`` is compressed, a token
inside a group sees later tokens of its group: nothing that stands there may be asked for the next
token. So tokens with a label stay whole there, as they do when they are decoded one by one, and
plain text needs an end that is taken for an answer (``continuation``).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.keep import keep
from ..runtime.kept import Kept, are_among
from ..runtime.level import Level
from ..runtime.state import State, states
from ..sites.decoder import Decoder
from ..sites.decoder_families import DECODER_FAMILIES
from . import losses, next_tokens
from .config import DistillationConfig
from .embeddings import Pooler
from .objective import Batch, Objective

FFN = "ffn"
_MODEL_TYPES = {family.name for family in DECODER_FAMILIES}


def is_decoder(config: Any) -> bool:
    """Whether it is the configuration of a decoder-only model that :func:`patch` knows."""
    return not config.is_encoder_decoder and config.get_text_config().model_type in _MODEL_TYPES


def has_decoder(model: nn.Module) -> bool:
    """Whether ``model`` is a decoder-only one, patched."""
    return any(isinstance(module, Decoder) for module in model.modules())


class DecoderObjective(Objective):
    """``logits_weight`` matches the next-token distribution, ``task_weight`` is cross-entropy:
    means over tokens with a label.

    Raises:
        ValueError: one of these is asked for and the model makes no logits, or makes them in a way
        of its own.
    """

    def __init__(
        self, model: nn.Module, args: DistillationConfig, pooler: Pooler | None = None
    ) -> None:
        super().__init__(model, args, pooler)
        (self.state,) = states(model)
        headed = getattr(model, "get_output_embeddings", lambda: None)() is not None
        self.head = next_tokens.Head(model) if headed else None
        if weighs_tokens(args):
            if self.head is None:
                raise ValueError(
                    "logits_weight and task_weight must be 0 for a decoder without a head, got "
                    f"{args.logits_weight} and {args.task_weight} for {type(model).__name__}"
                )
            if args.fsdp:
                raise ValueError(
                    "logits_weight and task_weight of a decoder must be 0 with fsdp, whose shards "
                    f"hold the head, got {args.logits_weight} and {args.task_weight}"
                )
            next_tokens.check_head(model, self.head)

    def student(self, forward: Any, batch: Batch, level: Level) -> Any:
        _check_labels(batch)  # an evaluation counts nothing before
        return super().student(forward, batch, level)

    def counts(self, batch: Batch) -> Tensor:
        found, labels = losses.counts(batch), batch.get("labels")
        if labels is not None:
            _check_labels(batch)
            found[2] = (labels[:, 1:] != losses.IGNORED).sum()  # nothing predicts a row's first one
        return found

    def arguments(self, batch: Batch, labelled: bool) -> dict[str, Any]:
        places = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)  # as generate() counts them
        given = {"position_ids": places} | super().arguments(batch, labelled=False)
        given |= {"use_cache": False}
        # Logits are made where they count, of the hidden states: see next_tokens.
        return given if self.head is None else given | {"logits_to_keep": 1}

    def kept(self, batch: Batch, level: Level) -> AbstractContextManager[Any]:
        ratios = feed_forward_ratios(self.state, [level])
        if not ratios:
            return nullcontext()
        return keep(self.model, decoded(batch, self.state.kept, max(ratios)))

    def answers(self, student: Any, teacher: Any, batch: Batch, total: Tensor) -> Tensor:
        args = self.args
        if self.head is None or not weighs_tokens(args):
            return torch.zeros((), device=total.device)
        ours, theirs = (
            next_tokens.predictions(found.hidden_states[-1], batch) for found in (student, teacher)
        )
        weights = args.logits_weight, args.task_weight
        found = next_tokens.loss(self.head, ours, theirs, next_tokens.targets(batch), *weights)
        return found / total[2].clamp_min(1)

    def likelihoods(self, outputs: Any, teacher: Any, batch: Batch) -> tuple[Tensor, Tensor] | None:
        if self.head is None or batch.get("labels") is None:
            return None
        ours, theirs = (
            next_tokens.predictions(found.hidden_states[-1], batch) for found in (outputs, teacher)
        )
        found = next_tokens.per_token(
            self.head, ours, None if outputs is teacher else theirs, next_tokens.targets(batch)
        )
        counted = batch["labels"][:, 1:] != losses.IGNORED
        rows = counted.nonzero()[:, 0]
        none = found[0].new_zeros(len(counted))
        return none.index_add(0, rows, found[0]), none.index_add(0, rows, found[1])


def _check_labels(batch: Batch) -> None:
    labels, size = batch.get("labels"), list(losses.masks(batch)[0].shape)
    if labels is not None and list(labels.shape) != size:
        raise ValueError(
            f"labels of a decoder must be tokens, of input_ids' shape {size}, got "
            f"{list(labels.shape)}"
        )


def weighs_tokens(args: DistillationConfig) -> bool:
    """Whether the loss looks at what a model says next."""
    return bool(args.logits_weight or args.task_weight)


def feed_forward_ratios(state: State, levels: Iterable[Level]) -> set[int]:
    """The ratios above 1 at which some feed-forward sublayer runs."""
    pairs = (pair for level in levels for pair in zip(state.sites, level.ratios, strict=True))
    return {k for site, k in pairs if site.placement == FFN and k > 1}


def decoded(batch: Batch, kept: Kept, ratio: int) -> Tensor:
    """bool ``[B, n]``: what stays whole of rows of prompts and answers, so that a forward over both
    computes what prefill and decoding do.

    These are all tokens from the first with a label on, and of the prompt before it what prefill
    leaves whole at its end: the last ``kept.last`` tokens and the ragged tail.

    Raises:
        ValueError: every token of these rows has a label, but for their first.
    """
    real = losses.masks(batch)[0]
    labels = batch.get("labels")
    answer = torch.zeros_like(real) if labels is None else real & (labels != losses.IGNORED)
    prompt = real & (answer.cumsum(-1) == 0)
    if bool((answer.any(-1) & (prompt.sum(-1) <= 1)).all()):
        raise ValueError(
            "labels must be -100 (none) on a row's prompt where ffn is compressed, for tokens with "
            "a label stay whole there: got rows in which every token has one"
        )
    place = real.cumsum(-1) - 1
    end = prompt.sum(-1, keepdim=True) - kept.last
    whole = prompt & (place < kept.first)
    if kept.ids:
        whole |= prompt & (place < end) & are_among(batch["input_ids"], kept.ids)
    begin = torch.where(whole, place + 1, 0).amax(-1, keepdim=True)
    # In front of tokens that are kept at the end a short group is as whole as any.
    tail = (end - begin).clamp_min(0) % ratio * (kept.last == 0)
    return real & (place >= end - tail)
