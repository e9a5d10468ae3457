"""Where each Hugging Face family keeps its self-attention sublayers: a row of data for each."""

from __future__ import annotations

import dataclasses
from typing import Any

from .attention_paths import AttentionPaths


def t5(prefix: str, **own: Any) -> AttentionPaths:
    inner = "SelfAttention"
    row = AttentionPaths(
        sublayer="layer.0",
        layer=f"{prefix}LayerSelfAttention",
        q=f"{inner}.q",
        k=f"{inner}.k",
        v=f"{inner}.v",
        o=f"{inner}.o",
        head_size=f"{inner}.key_value_proj_dim",
        scale=1.0,
        dropout=f"{inner}.dropout",
        outer_dropout="dropout",
        norm="layer_norm",
        norm_kind="rms",
        eps=("variance_epsilon", "eps"),
        bypassed=("layer_norm", "dropout", inner),
        table=f"block.0.layer.0.{inner}.relative_attention_bias",
        table_of=inner,
        returns=("position_bias", ""),
    )
    return dataclasses.replace(row, **own)


def umt5(prefix: str) -> AttentionPaths:
    """Each block has a table of its own."""
    table = "block.{layer}.layer.0.SelfAttention.relative_attention_bias"
    return t5(prefix, table=table, table_of="", returns=("",))


def bert(prefix: str, **own: Any) -> AttentionPaths:
    row = AttentionPaths(
        sublayer="attention",
        layer=f"{prefix}Attention",
        q="self.query",
        k="self.key",
        v="self.value",
        o="output.dense",
        head_size="self.attention_head_size",
        dropout="self.dropout",
        outer_dropout="output.dropout",
        norm="output.LayerNorm",
        post_norm=True,
        bypassed=("self", "output", "output.LayerNorm", "output.dropout"),
    )
    return dataclasses.replace(row, **own)


def pre_norm(prefix: str, norm: str) -> AttentionPaths:
    """A BERT's that norms in front of its products."""
    bypassed = ("self", norm, "output", "output.dropout")
    return bert(prefix, norm=norm, post_norm=False, bypassed=bypassed)


def rotary(prefix: str, sublayer: str = "self_attn", **own: Any) -> AttentionPaths:
    """Its block norms and adds the residual around the module."""
    row = AttentionPaths(
        sublayer=sublayer,
        layer=f"{prefix}Attention",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        o="o_proj",
        head_size="head_dim",
        dropout="attention_dropout",
        rotary="rotary_emb",
    )
    return dataclasses.replace(row, **own)


def bart(prefix: str) -> AttentionPaths:
    return rotary(prefix, o="out_proj", dropout="dropout", rotary="")


DISTILBERT = AttentionPaths(
    sublayer="attention",
    layer="DistilBertSelfAttention",
    q="q_lin",
    k="k_lin",
    v="v_lin",
    o="out_lin",
    head_size="attention_head_size",
    dropout="dropout",
    bypassed=("dropout",),
)
ALBERT = AttentionPaths(
    sublayer="attention",
    layer="AlbertAttention",
    q="query",
    k="key",
    v="value",
    o="dense",
    head_size="attention_head_size",
    dropout="attention_dropout",
    outer_dropout="output_dropout",
    norm="LayerNorm",
    post_norm=True,
    bypassed=("attention_dropout", "output_dropout", "LayerNorm"),
)
MPNET = AttentionPaths(
    sublayer="attention",
    layer="MPNetAttention",
    q="attn.q",
    k="attn.k",
    v="attn.v",
    o="attn.o",
    head_size="attn.attention_head_size",
    dropout="attn.dropout",
    outer_dropout="dropout",
    norm="LayerNorm",
    post_norm=True,
    bypassed=("attn", "attn.dropout", "LayerNorm", "dropout"),
    table="encoder.relative_attention_bias",
)
MODERNBERT = rotary(
    "ModernBert",
    sublayer="attn",
    q="",
    k="",
    v="",
    qkv="Wqkv",
    o="Wo",
    outer_dropout="out_drop",
    bypassed=("out_drop",),
    rotary_kind="attention_type",
    window="sliding_window",
)


def causal(prefix: str, **own: Any) -> AttentionPaths:
    """A LLaMA's or a relative's."""
    return rotary(prefix, scaling="scaling", absent=("attn_logit_softcapping",), **own)
