"""Tiny random models to project, what they are run on, and hard pruning said with indices."""

from __future__ import annotations

import torch
from torch import nn

import variator_kernels as vk
from tests.decoders import tiny as decoders
from tests.sites import tiny as encoders

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
T5S = (("t5", "relu"), ("t5", "gated-gelu"), ("mt5", "gated-gelu"))
BERTS = ("bert", "roberta", "distilbert", "electra")
ALL = (*DECODERS, *(f"{name}-{act}" for name, act in T5S), *BERTS)
OWN_HEADS = {"llama": False, "mistral": False, "qwen2": True, "qwen3": True, "gemma": True}
"""Whether the head is the embedding, as in the families' released models."""


def model(name: str, **settings):
    """In evaluation and float64."""
    family, _, act = name.partition("-")
    if family in DECODERS:
        return decoders.model(family, **{"tie_word_embeddings": OWN_HEADS[family]} | settings)
    return encoders.model(family, act or "gelu", **settings).double()


def batch(made: nn.Module, seed: int = 1):
    if made.config.is_encoder_decoder:
        ids, mask = encoders.batch(9, 5, 7, seed=seed)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.clamp_min(1).flip(1)}
    if made.config.model_type in DECODERS:
        return {"input_ids": decoders.ids(3, 20, seed)}
    ids, mask = encoders.batch(9, 5, 7, seed=seed)
    return {"input_ids": ids, "attention_mask": mask}


def output(made: nn.Module, inputs) -> torch.Tensor:
    with torch.no_grad():
        out = made(**inputs)
    return out.logits if "logits" in out else out[0]


def project(made: nn.Module, params: float | None = 0.7, **settings):
    if settings.keys() & {"hidden", "ffn"}:
        params = None
    settings.setdefault("start", "select")
    return vk.project(made, [batch(made)], params, **settings)


def reads(made: nn.Module, name: str, given) -> torch.Tensor:
    """What the module ``name`` reads on batches, of real tokens: ``[T, width]``."""
    seen: list[torch.Tensor] = []
    hook = made.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    for inputs in given:
        output(made, inputs)
        if "attention_mask" in inputs:
            seen[-1] = seen[-1][inputs["attention_mask"] == 1]
    hook.remove()
    return torch.cat([value.flatten(0, -2) for value in seen])
