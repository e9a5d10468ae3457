"""The tiny model from scratch, and the equal budget that every arm is trained with."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .. import internals
from ..harness import machine
from .data import Text

ROWS = 8
"""Of a step."""
TOKENS = 1024
"""That run at a time, which bounds the memory of logits."""
WARMUP = 0.1
SCRATCH_RATE = 3e-3
Step = Callable[[], None]


def tiny(text: Text, steps: int, step: Step = lambda: None) -> Any:
    """A byte-level LLaMA (d = 128, 4 layers, grouped queries), trained here once and kept in
    ``build/``."""
    folder = machine.ROOT / "build" / "projected" / f"tiny-{steps}-{text.length}"
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=text.length,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        made: Any = LlamaForCausalLM(config)
        groups = [{"params": list(made.parameters()), "lr": SCRATCH_RATE}]
        fit(made, groups, text, steps, 0, rows=16, step=step)
        part = Path(f"{folder}.part")
        made.save_pretrained(part)
        part.rename(folder)
    return LlamaForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def fit(
    model: Any, groups: list[dict[str, Any]], text: Text, steps: int, seed: int,
    rows: int = ROWS, teacher: Any = None, step: Step = lambda: None, bf16: bool = False,
) -> None:  # fmt: skip
    """AdamW, warm-up and a linear fall; the loss is the cross-entropy, or with a teacher half of it
    and half the divergence. The same seed gives every arm the same rows. The compressed gradient is
    clipped at 1, as ``ProjectionTrainer`` does. ``bf16``: products of forward and backward under
    autocast; parameters, W_C and the optimizer stay in fp32."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / max(1, math.ceil(WARMUP * steps)), 1.0) * (1 - n / steps)
    )
    apart = {id(p) for p in internals.projections(model)}
    trained = [p for group in groups for p in group["params"]]
    projected = internals.is_projected(model)
    model.train()
    # W_C is built once a step, and its gradient goes through the projections once.
    with internals.collecting(model) if projected else nullcontext():
        for _ in range(steps):
            ids = text.rows(rows, generator)
            for some in ids.split(max(1, TOKENS // text.length)):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = losses(model, some, teacher) * (len(some) / rows)
                loss.backward()
            if projected:
                internals.send(model)
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if id(p) not in apart])
            for parameter in trained:
                parameter.grad.mul_((1 / norm).clamp(max=1.0))
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            step()
    model.eval()


def losses(model: Any, ids: Tensor, teacher: Any) -> Tensor:
    """Cross-entropy of the next tokens, or with a teacher half of it and half the divergence."""
    logs = _logits(model, ids).log_softmax(-1)
    loss = F.nll_loss(logs, ids[:, 1:].flatten())
    if teacher is None:
        return loss
    with torch.no_grad():
        theirs = _logits(teacher, ids).log_softmax(-1)
    apart = F.kl_div(logs, theirs, reduction="batchmean", log_target=True)
    return 0.5 * loss + 0.5 * apart


def _logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return found.flatten(0, 1).float()
