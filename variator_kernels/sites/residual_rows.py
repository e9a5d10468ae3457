"""The families whose widths can be reduced: a row of data for each."""

from __future__ import annotations

import dataclasses
from typing import Any

from .residual import Part, Residual, Stack

_ATTENTION = Part(
    norm="input_layernorm",
    reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    writes="self_attn.o_proj",
)
_GATED = Part(
    norm="post_attention_layernorm",
    reads=("mlp.gate_proj", "mlp.up_proj"),
    writes="mlp.down_proj",
    inner=True,
)


def _llama(name: str, prefix: str, **own: Any) -> Residual:
    heads = ("ForCausalLM", "Model", "ForSequenceClassification", "ForTokenClassification")
    row = Residual(
        name=name,
        classes=tuple(f"{prefix}{head}" for head in heads),
        stacks=(Stack("", "layers", (_ATTENTION, _GATED), "norm"),),
        heads=("lm_head", "score"),
    )
    return dataclasses.replace(row, **own)


_SELF = Part(
    norm="layer.0.layer_norm",
    reads=tuple(f"layer.0.SelfAttention.{name}" for name in "qkv"),
    writes="layer.0.SelfAttention.o",
)
_CROSS = Part(
    norm="layer.1.layer_norm",
    reads=("layer.1.EncDecAttention.q",),
    writes="layer.1.EncDecAttention.o",
    memory=("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
)


def _t5_ffn(place: str) -> Part:
    return Part(
        norm=f"layer.{place}.layer_norm",
        reads=tuple(f"layer.{place}.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1")),
        writes=f"layer.{place}.DenseReluDense.wo",
        inner=True,
    )


def _t5(name: str, prefix: str) -> Residual:
    return Residual(
        name=name,
        classes=tuple(
            f"{prefix}{head}" for head in ("ForConditionalGeneration", "Model", "EncoderModel")
        ),
        stacks=(
            Stack("encoder", "block", (_SELF, _t5_ffn("1")), "final_layer_norm"),
            Stack("decoder", "block", (_SELF, _CROSS, _t5_ffn("2")), "final_layer_norm"),
        ),
        heads=("lm_head",),
        hidden="d_model",
        ffn="d_ff",
        head_size="d_kv",
        unties=False,
    )


RESIDUAL_FAMILIES = {
    row.name: row
    for row in (
        _llama("llama", "Llama"),
        _llama("mistral", "Mistral"),
        _llama("qwen2", "Qwen2"),
        _llama("qwen3", "Qwen3"),
        _llama("gemma", "Gemma", gain_offset=1.0),
        _t5("t5", "T5"),
        _t5("mt5", "MT5"),
        _t5("umt5", "UMT5"),
    )
}
FFN_FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
"""Rows of :mod:`.families` whose FFN width alone is reduced."""
WHY_FIXED = (
    "norms behind the residual sum bear no change of basis, and the configuration ties the size of "
    "attention heads to the hidden size"
)
