"""What plugins save on a dev set, in multiply-adds and measured time, and what they add."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import variator_kernels as vk
from variator_kernels.train import losses
from variator_kernels.train.collate import batches, collator

from .. import internals
from ..cases import models
from ..harness import checks
from ..harness.clock import Wall, quartiles, ratio
from ..harness.results import Row
from . import originals, tasks
from .stages import Setup

ROWS = 32
"""Rows of one batch; rows of similar length share one."""


@torch.no_grad()
def measure(
    setup: Setup, folder: Path, task: tasks.Task, ratios: tuple[int, ...], rounds: int
) -> list[Row]:
    """A row a ratio: cost, and seconds of the encoder over the dev set against the original's.

    The original runs as Hugging Face runs it. A row whose hidden states are not right, against
    float64, has no time.
    """
    model, tokenizer = originals.read(folder, task=True)
    dev, _ = tasks.load(setup.data, task, "dev", model, tokenizer)
    padded = batches(dev, collator(tokenizer, model.config), ROWS)
    inputs = [{k: batch[k] for k in ("input_ids", "attention_mask")} for batch in padded]
    encoder = _encoder(model)
    setup.patch(model, ratios)
    models.fill(model, 0)

    def over_all(k: int) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode(), vk.use_ratio(model, k):
                for batch in inputs:
                    encoder(**batch)

        return run

    verdicts = {k: check(encoder, model, inputs[len(inputs) // 2], k) for k in ratios}
    times = timed({k: over_all(k) for k in (1, *ratios)}, verdicts, 1, rounds)
    return [{"k": k, **cost(encoder, inputs, k), **times[k]} for k in ratios]


def timed(
    calls: dict[Any, Callable[[], Any]], verdicts: dict[Any, checks.Verdict], dense: Any,
    rounds: int,
) -> dict[Any, Row]:  # fmt: skip
    """Of each verdict's call whether its hidden states are right, and if so its seconds beside
    those of the call ``dense``."""
    for call in calls.values():
        call()
    seconds, _ = Wall().interleave(calls, rounds)
    made = {}
    for key, verdict in verdicts.items():
        made[key] = verdict.row()
        if verdict.ok:
            made[key] |= {
                "seconds": quartiles(seconds[key]), "dense_seconds": quartiles(seconds[dense]),
                "speedup": ratio(seconds[dense], seconds[key]),
            }  # fmt: skip
        else:
            made[key]["reason"] = "the hidden states are not right"
    return made


def added(folder: Path, placements: tuple[str, ...], bottleneck: int, ratio: int) -> float:
    """Parameters of a ratio's plugins, as a fraction of the encoder's FFNs'."""
    encoder = _encoder(originals.read(folder, task=True)[0])
    level = dict.fromkeys(placements, ratio)
    found = vk.flops.count(encoder, length=8, ratio=level, bottleneck=bottleneck)
    return (found.parameters.merge + found.parameters.decompress) / found.dense_parameters.ffn


def _encoder(model: Any) -> Any:
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def check(encoder: Any, model: Any, batch: dict[str, Tensor], ratio: int) -> checks.Verdict:
    """Real tokens of the kernels' outputs, against float64 and plain PyTorch."""
    real = losses.masks(batch)[0]

    def hidden(backend: str, dtype: torch.dtype) -> checks.Outputs:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.to(dtype)
        try:
            with internals.using_backend(model, backend), vk.use_ratio(model, ratio):
                return (encoder(**batch).last_hidden_state[real],)
        finally:
            model.to(torch.float32).load_state_dict(before)

    exact, plain = hidden("reference", torch.float64), hidden("reference", torch.float32)
    return checks.judge(hidden("auto", torch.float32), checks.truth(exact, plain))


def cost(encoder: Any, inputs: list[dict[str, Tensor]], ratio: int) -> Row:
    """Multiply-adds left in the encoder, as a fraction, and the rows' length."""
    used = dense = tokens = rows = 0
    for batch in inputs:
        lengths = batch["attention_mask"].sum(-1).tolist()
        tokens, rows = tokens + sum(lengths), rows + len(lengths)
        found = vk.flops.count(encoder, length=lengths, ratio=ratio)
        used += found.multiply_adds.total
        dense += found.dense_multiply_adds.total
    return {"tokens_a_row": tokens / rows, "multiply_adds_left": used / dense}
