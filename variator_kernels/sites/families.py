"""Where each Hugging Face family keeps its sublayers: a row of data for each."""

from __future__ import annotations

import dataclasses
from typing import Any

from . import attention_rows as attention
from .decoder_families import DECODER_FAMILIES
from .family import Family


def _module(name: str) -> str:
    return f"transformers.models.{name}.modeling_{name.removesuffix('_text')}"


def _t5(name: str, prefix: str, **own: Any) -> Family:
    row = Family(
        name=name,
        module=_module(name),
        encoder=f"{prefix}Stack",
        block=f"{prefix}Block",
        layer=f"{prefix}LayerFF",
        blocks="block",
        sublayer="layer.-1",
        steps=("DenseReluDense",),
        w_in=("DenseReluDense.wi", "DenseReluDense.wi_0"),
        w_gate="DenseReluDense.wi_1",
        w_out="DenseReluDense.wo",
        act="DenseReluDense.act",
        inner_dropout="DenseReluDense.dropout",
        outer_dropout="dropout",
        container="DenseReluDense",
        container_classes=(f"{prefix}DenseActDense", f"{prefix}DenseGatedActDense"),
        norm="layer_norm",
        norm_class=f"{prefix}LayerNorm",
        norm_kind="rms",
        eps=("variance_epsilon", "eps"),
        bypassed=("layer_norm", "dropout"),
        inner_size="d_ff",
        attention=attention.t5(prefix),
    )
    return dataclasses.replace(row, **own)


def _bert(name: str, prefix: str, **own: Any) -> Family:
    row = Family(
        name=name,
        module=_module(name.replace("-", "_")),
        encoder=f"{prefix}Model",
        block=f"{prefix}Layer",
        layer=f"{prefix}Layer",
        blocks="encoder.layer",
        steps=("intermediate", "output.dense"),
        w_in=("intermediate.dense",),
        w_out="output.dense",
        act="intermediate.intermediate_act_fn",
        outer_dropout="output.dropout",
        container="intermediate",
        container_classes=(f"{prefix}Intermediate",),
        norm="output.LayerNorm",
        post_norm=True,
        bypassed=("output", "output.LayerNorm", "output.dropout"),
        # Measured on MiniLM: the first token is what all others attend to.
        keep_first=1,
        attention=attention.bert(prefix),
    )
    return dataclasses.replace(row, **own)


def _pre_norm(name: str, prefix: str, norm: str, **own: Any) -> Family:
    """A BERT whose blocks norm in front of their FFN."""
    bypassed = (*dict.fromkeys((norm, "output", own.get("outer_dropout", "output.dropout"))),)
    row = _bert(name, prefix, norm=norm, post_norm=False)
    return dataclasses.replace(row, **{"bypassed": tuple(filter(None, bypassed)), **own})


def _gated(name: str, prefix: str, **own: Any) -> Family:
    """Its block norms and adds the residual around a gated FFN that is a module."""
    row = Family(
        name=name,
        module=_module(name),
        encoder=f"{prefix}Model",
        block=f"{prefix}Layer",
        layer=f"{prefix}MLP",
        blocks="layers",
        sublayer="mlp",
        w_in=("gate_proj",),
        w_gate="up_proj",
        w_out="down_proj",
        act="act_fn",
        attention=attention.rotary(prefix),
    )
    return dataclasses.replace(row, **own)


def _bart(name: str, prefix: str, **own: Any) -> Family:
    """The encoder of an encoder-decoder: its FFN is three attributes of the block."""
    row = Family(
        name=name,
        module=_module(name.replace("-", "_")),
        encoder=f"{prefix}Encoder",
        block=f"{prefix}EncoderLayer",
        layer=f"{prefix}EncoderLayer",
        blocks="layers",
        steps=("fc1", "activation_fn", "fc2"),
        called=("fc1", "activation_fn", "fc2"),
        w_in=("fc1",),
        w_out="fc2",
        act="activation_fn",
        inner_dropout="activation_dropout",
        outer_dropout="dropout",
        inner_size="encoder_ffn_dim",
        attention=attention.bart(prefix),
    )
    return dataclasses.replace(row, **own)


_CALLED = ("intermediate", "output")
_SPARSE = "sparse attention"


def _none(why: str) -> dict[str, Any]:
    """Attention that the placements around it cannot work at."""
    return {"attention": None, "no_attention": why}


# Its block adds the residual and norms by itself, around the module that is patched.
_DISTILBERT = Family(
    name="distilbert",
    module=_module("distilbert"),
    encoder="DistilBertModel",
    block="TransformerBlock",
    layer="FFN",
    blocks="transformer.layer",
    sublayer="ffn",
    steps=("lin1", "activation", "lin2"),
    w_in=("lin1",),
    w_out="lin2",
    act="activation",
    outer_dropout="dropout",
    bypassed=("dropout",),
    inner_size="hidden_dim",
    attention=attention.DISTILBERT,
)

# Few blocks run many times.
_ALBERT = Family(
    name="albert",
    module=_module("albert"),
    encoder="AlbertModel",
    block="AlbertLayer",
    layer="AlbertLayer",
    blocks="encoder.albert_layer_groups",
    inner_blocks="albert_layers",
    passes="num_hidden_layers",
    method="ff_chunk",
    steps=("ffn", "activation", "ffn_output"),
    w_in=("ffn",),
    w_out="ffn_output",
    act="activation",
    attention=attention.ALBERT,
)

T5_FAMILIES = (
    _t5("t5", "T5"),
    _t5("mt5", "MT5"),
    _t5("umt5", "UMT5", attention=attention.umt5("UMT5")),
    _t5(
        "longt5",
        "LongT5",
        attention=attention.LONGT5,
        other_attention=(attention.LONGT5_GLOBAL,),
    ),
)
BERT_FAMILIES = (
    _bert("bert", "Bert"),
    _bert("roberta", "Roberta"),
    _DISTILBERT,
    _bert("electra", "Electra"),
    _bert("xlm-roberta", "XLMRoberta"),
    _bert("camembert", "Camembert"),
    _bert("ernie", "Ernie"),
    _bert(
        "data2vec-text",
        "Data2VecText",
        module="transformers.models.data2vec.modeling_data2vec_text",
    ),
    _bert("bert-generation", "BertGeneration", encoder="BertGenerationEncoder"),
    _bert("rembert", "RemBert"),
    _bert("roc_bert", "RoCBert"),
    _bert("roformer", "RoFormer", attention=attention.ROFORMER),
    _bert("splinter", "Splinter"),
    _bert("layoutlm", "LayoutLM"),
    _bert("layoutlmv3", "LayoutLMv3", appends=True, attention=attention.LAYOUTLMV3),
    _bert("markuplm", "MarkupLM"),
    _bert("lilt", "Lilt", uncounted="the stream of the layout", **_none("two streams")),
    _bert("tapas", "Tapas"),
    _bert("convbert", "ConvBert", uncounted="convolutions", **_none("convolutions")),
    _bert("big_bird", "BigBird", pads="block_size", attention=attention.BIG_BIRD),
    _bert(
        "longformer",
        "Longformer",
        method="ff_chunk",
        pads="attention_window",
        uncounted=_SPARSE,
        **_none(_SPARSE),
    ),
    _bert("mpnet", "MPNet", called=_CALLED, attention=attention.MPNET),
    _bert(
        "deberta",
        "Deberta",
        called=_CALLED,
        norm_class="DebertaLayerNorm",
        eps=("variance_epsilon", "eps"),
        attention=attention.DEBERTA,
    ),
    _bert("deberta-v2", "DebertaV2", called=_CALLED, attention=attention.DEBERTA_V2),
    _ALBERT,
    _pre_norm(
        "megatron-bert", "MegatronBert", "ln", attention=attention.pre_norm("MegatronBert", "ln")
    ),
    _pre_norm(
        "xlm-roberta-xl",
        "XLMRobertaXL",
        "LayerNorm",
        outer_dropout="",
        attention=attention.pre_norm("XLMRobertaXL", "self_attn_layer_norm"),
    ),
    _pre_norm(
        "esm",
        "Esm",
        "LayerNorm",
        act="",
        activation="gelu",
        attention=attention.ESM,
    ),
    _pre_norm(
        "roberta-prelayernorm",
        "RobertaPreLayerNorm",
        "intermediate.LayerNorm",
        steps=("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
        container="",
        container_classes=(),
        bypassed=("intermediate", "intermediate.LayerNorm", "output", "output.dropout"),
        attention=attention.pre_norm("RobertaPreLayerNorm", "LayerNorm"),
    ),
    _gated(
        "modernbert",
        "ModernBert",
        block="ModernBertEncoderLayer",
        w_in=("Wi",),
        w_gate="",
        fused="in_gate",
        w_out="Wo",
        act="act",
        inner_dropout="drop",
        attention=attention.MODERNBERT,
    ),
    _gated("nomic_bert", "NomicBert"),
    _gated("gte", "Gte", inner_dropout="dropout"),
    _gated("eurobert", "EuroBert", block="EuroBertDecoderLayer"),
    _gated(
        "jina_embeddings_v3",
        "JinaEmbeddingsV3",
        w_in=("fc1",),
        w_gate="",
        w_out="fc2",
        act="activation_fn",
    ),
)
BART_FAMILIES = (
    _bart("bart", "Bart"),
    _bart("mbart", "MBart"),
    _bart("plbart", "PLBart"),
    _bart("mvp", "Mvp", attention=attention.MVP),
    _bart("marian", "Marian"),
    _bart("m2m_100", "M2M100"),
    _bart("pegasus", "Pegasus"),
    _bart("blenderbot", "Blenderbot"),
    _bart("blenderbot-small", "BlenderbotSmall"),
    _bart("led", "LED", pads="attention_window", uncounted=_SPARSE, **_none(_SPARSE)),
    _bart(
        "bigbird_pegasus",
        "BigBirdPegasus",
        inner_dropout="",
        pads="block_size",
        uncounted=_SPARSE,
        **_none(_SPARSE),
    ),
)
FAMILIES = {
    family.name: family
    for family in (*T5_FAMILIES, *BERT_FAMILIES, *BART_FAMILIES, *DECODER_FAMILIES)
}


def known(family: Family) -> bool:
    """Whether it is of the table."""
    row = FAMILIES.get(family.name)
    return row is not None and family in row.forms()


REFUSED = {
    "switch_transformers": "its FFNs are mixtures of experts, and which tokens fit depends on all",
    "mobilebert": "each of its blocks has several FFNs between bottlenecks",
    "squeezebert": "its FFNs are grouped convolutions over channels-first states",
    "funnel": "its blocks pool the sequence, so the mask does not fit their tokens",
    "fnet": "it mixes tokens by Fourier transforms and takes no mask",
    "luke": "its blocks run over words and entities, and the mask is of words alone",
    "ibert": "its FFNs are quantised step by step, with scales beside the hidden states",
    "xmod": "its blocks have language adapters between FFN and norm",
}
"""Encoders that no row can describe, and why."""
