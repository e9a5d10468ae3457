"""Where each Hugging Face family keeps its FFN sublayers, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One family's names. Paths are dotted attributes; a number in them is an index, and the empty
    path is the module itself."""

    name: str
    """``config.model_type``."""
    module: str
    """The module that defines its classes."""
    encoder: str
    """The module that takes the 2-D ``attention_mask``; one that is a decoder is left alone."""
    block: str
    layer: str
    """The FFN sublayer, norm to residual. In some families it is the block."""
    blocks: str
    """From the encoder to its blocks."""
    sublayer: str
    """From a block to its FFN sublayer. All paths below start there."""
    steps: tuple[str, ...]
    """The modules that, one after another, are the FFN proper."""
    w_in: tuple[str, ...]
    """The product under the activation: the first that is there."""
    w_out: str
    act: str
    outer_dropout: str
    container: str = ""
    """The module around ``w_in``, if there is one, and the classes whose weights tell all."""
    container_classes: tuple[str, ...] = ()
    w_gate: str = ""
    """The product beside ``w_in``, if there is one."""
    inner_dropout: str = ""
    norm: str = ""
    """The sublayer's norm; empty where the block has it (and the residual) outside of ``layer``."""
    norm_class: str = "LayerNorm"
    norm_kind: str = "layer"
    eps: tuple[str, ...] = ("eps",)
    """The norm's epsilon: the first that is there (a fused norm may stand in)."""
    post_norm: bool = False
    bypassed: tuple[str, ...] = ()
    """What the kernels replace: nobody may have hooked it."""
    inner_size: str = "intermediate_size"
    """Where the configuration has the FFN's inner size."""
    keep_first: int = 0
    """How many first tokens of a row new plugins keep whole, where nobody says."""


def _t5(name: str, prefix: str) -> Family:
    return Family(
        name=name,
        module=f"transformers.models.{name}.modeling_{name}",
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
    )


def _bert(name: str, prefix: str) -> Family:
    return Family(
        name=name,
        module=f"transformers.models.{name}.modeling_{name}",
        encoder=f"{prefix}Model",
        block=f"{prefix}Layer",
        layer=f"{prefix}Layer",
        blocks="encoder.layer",
        sublayer="",
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
    )


# Its block adds the residual and norms by itself, around the module that is patched.
_DISTILBERT = Family(
    name="distilbert",
    module="transformers.models.distilbert.modeling_distilbert",
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
)

T5_FAMILIES = (_t5("t5", "T5"), _t5("mt5", "MT5"), _t5("umt5", "UMT5"))
BERT_FAMILIES = (
    _bert("bert", "Bert"),
    _bert("roberta", "Roberta"),
    _DISTILBERT,
    _bert("electra", "Electra"),
)
FAMILIES = {family.name: family for family in (*T5_FAMILIES, *BERT_FAMILIES)}
ROW = "variator_family"
"""Class attribute of a patched class: its :class:`Family`."""


def follow(module: Any, path: str) -> Any:
    """``follow(block, "layer.-1")`` is ``block.layer[-1]``; the empty path is ``block``."""
    for name in path.split(".") if path else ():
        module = module[int(name)] if name.lstrip("-").isdigit() else getattr(module, name)
    return module


def lookup(module: Any, path: str) -> Any:
    """:func:`follow` over attributes alone; None where one is missing, or for the empty path."""
    if not path:
        return None
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def is_a(module: Any, family: Family, name: str) -> bool:
    """Whether ``module`` is, or derives from, the family's class ``name``."""
    # By name along the MRO: no family has to be imported only to see that it is absent.
    return any(
        kind.__name__ == name and kind.__module__ == family.module for kind in type(module).__mro__
    )
