"""Decoders that merged keys would not be right in, refused when they are patched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..runtime.site import Site
from .found import Found

_GROWING = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies depend on the highest position of a call."""


def check_decoder(found: Found, placements: Iterable[str]) -> None:
    """What ``placements`` ask for can be in this model, if it is a decoder.

    Raises:
        ValueError: it cannot.
    """
    family = found.family
    if not family.decoder:
        return
    if "attention" in placements:
        raise ValueError(
            f"placements must not hold 'attention' for {family.name}, a decoder: its queries must "
            "stay whole; 'attention_kv' merges keys and values alone"
        )
    if says := both_ways(found.encoder.config):
        raise ValueError(
            f"model must be causal, as {family.name} is taken to be, got a config with {says}"
        )
    for number, layer in enumerate(found.attentions):
        if not getattr(layer, "is_causal", True):
            raise ValueError(
                f"model must be causal, as {family.name} is taken to be, got layer {number} whose "
                "attention is not (use_bidirectional_attention)"
            )
    if "attention_kv" not in placements:
        return
    if not any(found.has(Site("attention_kv", number)) for number in range(len(found.blocks))):
        raise ValueError(
            f"placements must not hold 'attention_kv' for a {family.name} whose layers all have "
            "sliding attention, which sees no merged key"
        )
    kind = _rope(found.encoder.config)
    if kind in _GROWING:
        raise ValueError(
            f"placements must not hold 'attention_kv' for a {family.name} with RoPE of type "
            f"{kind!r}, which turns all keys anew when a text grows"
        )


def both_ways(config: Any) -> str:
    """What ``config`` has that makes queries see later tokens, or nothing."""
    if getattr(config, "is_causal", None) is False:
        return "is_causal=False"
    # Other configurations may hold the name too, but nothing reads it there.
    gemma = str(getattr(config, "model_type", "")).startswith("gemma")
    both = getattr(config, "use_bidirectional_attention", None) if gemma else None
    return f"use_bidirectional_attention={both!r}" if both else ""


def _rope(config: Any) -> str | None:
    every = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [every, *(part for part in every.values() if isinstance(part, dict))]
    kinds = [part.get("rope_type", part.get("type")) for part in parts]
    return next((kind for kind in kinds if kind in _GROWING), None)
