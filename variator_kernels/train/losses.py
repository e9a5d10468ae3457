"""The distillation loss: hidden states of the compressed model against those of the dense one.

All sums run over real tokens (embeddings: rows) and are divided by their number, so padding
changes nothing. Numbers of them are counted over all devices and accumulated batches of a step
first (:func:`counts`): the same global batch gives the same gradient, however it is cut up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a position that has none, as in ``transformers``."""
LABELS = ("labels", "label", "label_ids")
Embed = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""``embed(hidden, batch)``: ``[B, e]``, rows of length 1, of the last hidden states."""


def masks(batch: Mapping[str, Any]) -> list[Tensor]:
    """Where the real tokens are, ``[B, n]`` bool: of the encoder, then of a decoder.

    Raises:
        ValueError: the batch has no ``attention_mask``, or nothing tells the decoder's tokens.
    """
    if batch.get("attention_mask") is None:
        raise ValueError("a batch must hold attention_mask: the loss runs over real tokens only")
    found = [batch["attention_mask"] != 0]
    if batch.get("decoder_attention_mask") is not None:
        found.append(batch["decoder_attention_mask"] != 0)
    elif batch.get("decoder_input_ids") is not None:
        if batch.get("labels") is None:
            raise ValueError(
                "a batch with decoder_input_ids must hold decoder_attention_mask or labels: the "
                "loss runs over real tokens only"
            )
        found.append(batch["labels"] != IGNORED)
    return found


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model takes to give no loss of its own."""
    return {key: value for key, value in batch.items() if key not in LABELS}


def counts(batch: Mapping[str, Any]) -> Tensor:
    """``[4]``: real tokens of the encoder and of the decoder, labels, and rows with a token."""
    real = masks(batch)
    sizes = [mask.sum() for mask in real]
    sizes += [sizes[0].new_zeros(())] * (2 - len(sizes))
    labels = batch.get("labels")
    sizes.append(sizes[0].new_zeros(()) if labels is None else (labels != IGNORED).sum())
    return torch.stack([*sizes, real[0].any(-1).sum()])


def stacks(outputs: Any) -> list[tuple[Tensor, ...]]:
    """All hidden states ``[B, n, d]``, embeddings first: of the encoder, then of a decoder."""
    if getattr(outputs, "encoder_hidden_states", None) is not None:
        return [outputs.encoder_hidden_states, outputs.decoder_hidden_states]
    return [outputs.hidden_states]


def record_hidden_states(model: Any) -> None:
    """Let ``transformers`` find them in a model that FSDP2 has sharded.

    FSDP2 puts a class of its own over each module's, and ``transformers`` looks up what a model
    records by the name of its class.
    """
    from transformers.modeling_utils import _CAN_RECORD_REGISTRY

    for module in model.modules():
        if (names := getattr(module, "_can_record_outputs", None)) is not None:
            # In some versions its own __setitem__ takes the model, in others it is a plain dict.
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), names)


def squared_errors(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """``[B]``: squared distance of a row's real tokens, a mean over the hidden size."""
    error = (student.float() - teacher.float()).square().mean(-1)
    return torch.where(mask, error, 0).sum(-1)


def relative_errors(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """``[B]``: a token's squared distance over the teacher's squared length, summed over real
    tokens. A residual stream grows layer by layer; this weighs its layers alike."""
    student, teacher = student.float(), teacher.float()
    size = teacher.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    error = (student - teacher).square().mean(-1) / size
    return torch.where(mask, error, 0).sum(-1)


def distillation(
    student: Any, teacher: Any, batch: Mapping[str, Any], total: Tensor, layer_weight: float = 0.0
) -> Tensor:
    """Mean squared error of the last hidden states: the encoder's plus a decoder's (paper 3.3).

    Args:
        student, teacher: model outputs with all hidden states.
        total: :func:`counts` of all that the loss is a mean over; ``batch`` may be a part of it.
        layer_weight: adds this times the mean over the inner layers of their relative error.
    """
    loss = torch.zeros((), device=total.device)
    for ours, theirs, mask, size in zip(
        stacks(student), stacks(teacher), masks(batch), total, strict=False
    ):
        size = size.clamp_min(1)
        loss = loss + squared_errors(ours[-1], theirs[-1], mask).sum() / size
        inner = list(zip(ours[1:-1], theirs[1:-1], strict=True)) if layer_weight else []
        for a, b in inner:
            loss = loss + layer_weight / len(inner) * relative_errors(a, b, mask).sum() / size
    return loss


def task(outputs: Any, batch: Mapping[str, Any], total: Tensor) -> Tensor:
    """The model's own loss, a mean over labels, as this batch's share of ``total``'s labels."""
    return outputs.loss.float() * counts(batch)[2] / total[2].clamp_min(1)


def logits(student: Any, teacher: Any, batch: Mapping[str, Any], total: Tensor) -> Tensor:
    """KL divergence of the student's class distribution from the teacher's, a mean over labels."""
    real = batch["labels"] != IGNORED
    divergence = F.kl_div(
        student.logits.float().log_softmax(-1),
        teacher.logits.float().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return torch.where(real, divergence, 0).sum() / total[2].clamp_min(1)


def cosines(embed: Embed, student: Any, teacher: Any, batch: Mapping[str, Any]) -> Tensor:
    """``[B]``: of each row's embedding to the teacher's; 1 for a row without real tokens."""
    ours, theirs = (embed(stacks(found)[0][-1], batch) for found in (student, teacher))
    return torch.where(masks(batch)[0].any(-1), (ours * theirs).sum(-1), 1)


def embeddings(
    embed: Embed, student: Any, teacher: Any, batch: Mapping[str, Any], total: Tensor
) -> Tensor:
    """1 - the cosine of the embeddings, half their squared distance: a mean over rows.

    Nothing besides on the similarities of pairs of rows: tried on MiniLM, it did not bring these
    nearer, and its pairs depend on how rows are cut into batches.
    """
    return (1 - cosines(embed, student, teacher, batch)).sum() / total[3].clamp_min(1)
