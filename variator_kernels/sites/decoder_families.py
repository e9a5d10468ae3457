"""Where decoder-only families keep their sublayers: a row of data for each."""

from __future__ import annotations

import dataclasses
from typing import Any

from . import attention_rows as attention
from .family import Family


def _llama(name: str, prefix: str, **own: Any) -> Family:
    """Blocks norm and add the residual around attention and a gated FFN, both modules."""
    home = name.removesuffix("_text")
    row = Family(
        name=name,
        module=f"transformers.models.{home}.modeling_{home}",
        encoder=f"{prefix}Model",
        block=f"{prefix}DecoderLayer",
        layer=f"{prefix}MLP",
        blocks="layers",
        sublayer="mlp",
        w_in=("gate_proj",),
        w_gate="up_proj",
        w_out="down_proj",
        act="act_fn",
        block_norms=("input_layernorm", "post_attention_layernorm"),
        block_norm_class=f"{prefix}RMSNorm",
        decoder=True,
        # All others attend to the first ones.
        keep_first=4,
        attention=attention.causal(prefix),
    )
    return dataclasses.replace(row, **own)


_OTHER_NORMS: dict[str, Any] = {"block_norms": (), "block_norm_class": ""}
"""Gemma's multiply by one more than their weight."""
_NORMS = {"q_norm": "q_norm", "k_norm": "k_norm"}
_PER_LAYER = {"sliding": "sliding_window"}
_FOR_ALL = {"sliding": "config.sliding_window"}
DECODER_FAMILIES = (
    _llama("llama", "Llama"),
    _llama("mistral", "Mistral", attention=attention.causal("Mistral", **_FOR_ALL)),
    _llama("qwen2", "Qwen2", attention=attention.causal("Qwen2", **_PER_LAYER)),
    _llama("qwen3", "Qwen3", attention=attention.causal("Qwen3", **_NORMS, **_PER_LAYER)),
    _llama(
        "smollm3",
        "SmolLM3",
        attention=attention.causal("SmolLM3", turns="use_rope", **_PER_LAYER),
    ),
    _llama("gemma", "Gemma", **_OTHER_NORMS),
    _llama(
        "gemma2",
        "Gemma2",
        attention=attention.causal("Gemma2", **_PER_LAYER),
        **_OTHER_NORMS,
    ),
    _llama(
        "gemma3_text",
        "Gemma3",
        encoder="Gemma3TextModel",
        attention=attention.causal(
            "Gemma3", rotary_kind="self_attn.layer_type", **_NORMS, **_PER_LAYER
        ),
        **_OTHER_NORMS,
    ),
    _llama(
        "phi3",
        "Phi3",
        w_in=("gate_up_proj",),
        w_gate="",
        fused="in_gate",
        w_out="down_proj",
        act="activation_fn",
        attention=attention.causal(
            "Phi3", q="", k="", v="", qkv="qkv_proj", key_heads="num_key_value_heads", **_FOR_ALL
        ),
    ),
    _llama(
        "olmo2",
        "Olmo2",
        block_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        attention=attention.causal("Olmo2", **_NORMS),
    ),
)
