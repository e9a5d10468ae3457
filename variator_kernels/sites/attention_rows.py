"""Where each Hugging Face family keeps its self-attention sublayers: a row of data for each."""

from __future__ import annotations

import dataclasses
from typing import Any

from .attention_paths import AttentionPaths
from .term_paths import DistancePaths, GlobalPaths, PlacePaths


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
        scaling=f"{inner}.scaling",
        dropout=f"{inner}.dropout",
        outer_dropout="dropout",
        norm="layer_norm",
        norm_kind="rms",
        eps=("variance_epsilon", "eps"),
        bypassed=("layer_norm", "dropout", inner),
        absent=(f"{inner}.is_decoder",),
        causal=f"{inner}.is_causal",
        encoder_absent=("is_decoder",),
        table=f"block.0.layer.0.{inner}.relative_attention_bias",
        table_of=inner,
        returns=("position_bias", ""),
    )
    return dataclasses.replace(row, **own)


def umt5(prefix: str) -> AttentionPaths:
    """Each block has a table of its own."""
    table = "block.{layer}.layer.0.SelfAttention.relative_attention_bias"
    return t5(prefix, table=table, table_of="", returns=("",))


def _longt5(kind: str, **own: Any) -> AttentionPaths:
    inner = f"{kind}SelfAttention"
    return t5(
        "LongT5",
        layer=f"LongT5Layer{inner}",
        **{part: f"{inner}.{part}" for part in "qkvo"},
        head_size=f"{inner}.key_value_proj_dim",
        scaling=f"{inner}.scaling",
        dropout=f"{inner}.dropout",
        bypassed=("layer_norm", "dropout", inner, *own.pop("bypassed", ())),
        absent=(f"{inner}.is_decoder",),
        causal=f"{inner}.is_causal",
        table=f"block.0.layer.0.{inner}.relative_attention_bias",
        table_of=inner,
        window=f"{inner}.block_len",
        local_block=f"{inner}.block_len",
        returns=("position_bias",),
        **own,
    )


LONGT5 = _longt5("Local")
_GLOBAL = "TransientGlobalSelfAttention"
LONGT5_GLOBAL = _longt5(
    "TransientGlobal",
    bypassed=(f"{_GLOBAL}.global_input_layer_norm",),
    global_keys=GlobalPaths(
        size=f"{_GLOBAL}.global_block_size",
        norm=f"{_GLOBAL}.global_input_layer_norm",
        table=f"block.0.layer.0.{_GLOBAL}.global_relative_attention_bias",
    ),
)


def bert(prefix: str, **own: Any) -> AttentionPaths:
    row = AttentionPaths(
        sublayer="attention",
        layer=f"{prefix}Attention",
        q="self.query",
        k="self.key",
        v="self.value",
        o="output.dense",
        head_size="self.attention_head_size",
        scaling="self.scaling",
        dropout="self.dropout",
        outer_dropout="output.dropout",
        norm="output.LayerNorm",
        post_norm=True,
        bypassed=("self", "output", "output.LayerNorm", "output.dropout"),
        absent=("is_cross_attention", "self.is_decoder"),
        heads="self.num_attention_heads",
        causal="self.is_causal",
    )
    return dataclasses.replace(row, **own)


def pre_norm(prefix: str, norm: str) -> AttentionPaths:
    """A BERT's that norms in front of its products."""
    bypassed = ("self", norm, "output", "output.dropout")
    return bert(prefix, norm=norm, post_norm=False, bypassed=bypassed)


BIG_BIRD = bert("BigBird", inner="self", inner_class="BigBirdSelfAttention")
ROFORMER = bert(
    "RoFormer",
    sines="encoder.embed_positions",
    turned="sinusoidal_pos",
    absent=("self.rotary_value", "is_cross_attention", "self.is_decoder"),
    encoder_absent=("config.rotary_value",),
)
# Its queries are divided by the root of the head's size before they turn.
ESM = dataclasses.replace(
    pre_norm("Esm", "LayerNorm"), scales_scaled=True, rotary="rotary_embeddings", returns=()
)
_DISTANCES = DistancePaths(
    vectors="encoder.get_rel_embedding",
    kinds="self.pos_att_type",
    used="self.relative_attention",
    k="self.pos_key_proj",
    q="self.pos_query_proj",
    dropout="self.pos_dropout",
    shared="self.share_att_key",
    span="self.pos_ebd_size",
    buckets="encoder.position_buckets",
    max_distance="encoder.max_relative_positions",
)
DEBERTA_V2 = bert(
    "DebertaV2",
    q="self.query_proj",
    k="self.key_proj",
    v="self.value_proj",
    distances=_DISTANCES,
    encoder_absent=("config.z_steps",),
)
DEBERTA = bert(
    "Deberta",
    q="",
    k="",
    v="",
    qkv="self.in_proj",
    qkv_heads=True,
    q_bias="self.q_bias",
    v_bias="self.v_bias",
    eps=("variance_epsilon", "eps"),
    distances=dataclasses.replace(
        _DISTANCES,
        k="self.pos_proj",
        q="self.pos_q_proj",
        shared="",
        span="self.max_relative_positions",
        buckets="",
        max_distance="",
        of_row=True,
        counts_all=True,
    ),
    mixes=("self.head_logits_proj", "self.head_weights_proj"),
)
LAYOUTLMV3 = bert(
    "LayoutLMv3",
    places=(
        PlacePaths(
            "encoder.rel_pos_bias.weight",
            "position_ids",
            max_distance="encoder.max_rel_pos",
            used=("encoder.has_relative_attention_bias",),
            here=("self.has_relative_attention_bias",),
            buckets="encoder.rel_pos_bins",
        ),
        *(
            PlacePaths(
                f"encoder.rel_pos_{axis}_bias.weight",
                "bbox",
                column,
                max_distance="encoder.max_rel_2d_pos",
                used=("encoder.has_relative_attention_bias", "encoder.has_spatial_attention_bias"),
                here=("self.has_relative_attention_bias", "self.has_spatial_attention_bias"),
                buckets="encoder.rel_2d_pos_bins",
            )
            for axis, column in (("x", 0), ("y", 3))
        ),
    ),
    carrier="encoder",
    carrier_class="LayoutLMv3Encoder",
    returns=(),
)


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
        scaling="scaling",
        dropout="attention_dropout",
        rotary="rotary_emb",
    )
    return dataclasses.replace(row, **own)


def bart(prefix: str) -> AttentionPaths:
    return rotary(prefix, o="out_proj", dropout="dropout", rotary="")


MVP = dataclasses.replace(bart("Mvp"), encoder_absent=("use_prompt",))
DISTILBERT = AttentionPaths(
    sublayer="attention",
    layer="DistilBertSelfAttention",
    q="q_lin",
    k="k_lin",
    v="v_lin",
    o="out_lin",
    head_size="attention_head_size",
    scaling="scaling",
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
    scaling="scaling",
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
    window_of="config.local_attention",
)


def causal(prefix: str, **own: Any) -> AttentionPaths:
    """A LLaMA's or a relative's."""
    return rotary(prefix, absent=("attn_logit_softcapping",), **own)
