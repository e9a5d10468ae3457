"""What a family is: where a model keeps its sublayers, as data."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from .attention_paths import AttentionPaths
from .fields import CHOICES, check_type


@dataclass(frozen=True)
class Family:
    """Where models of one kind keep their FFN sublayers; ``docs/families.md`` has an example.

    Paths are dotted attributes; a number in them is an index, and the empty path is the module
    itself. A path that only some of a family's models have may stay: it is looked up in each.

    Raises:
        TypeError: a field has the wrong type. ValueError: fields do not fit together.
    """

    name: str
    """``config.model_type``, or any name of your own: plugin files carry it."""
    module: str
    """The importable module that defines the classes ``encoder``, ``block`` and ``layer``."""
    encoder: str
    """The class that gets the 2-D mask; one whose ``config.is_decoder`` is set is left alone."""
    block: str
    """The class of one layer: attention and FFN."""
    layer: str
    """The class of the FFN sublayer; in some families it is the block."""
    blocks: str
    """From the encoder to its blocks."""
    w_in: str | tuple[str, ...]
    """From the sublayer (as all paths below) to the product under the activation: the first of
    these that is there."""
    w_out: str
    """To the last product."""
    act: str = ""
    """To the activation module."""
    activation: str = ""
    """The activation's name, where it is a function that no path leads to."""
    sublayer: str = ""
    """From a block to its FFN sublayer."""
    steps: tuple[str, ...] = ()
    """The modules that, one after another, are the FFN proper: they run where weights do not tell
    all (LoRA, hooks). Without any, the sublayer itself is the FFN, no more and no less."""
    called: tuple[str, ...] = ()
    """For a block that has no method for its FFN: the attributes of the block that its ``forward``
    calls for it, from first to last. All but the last pass x through, the last gives the sublayer's
    output."""
    method: str = "feed_forward_chunk"
    """For a block that has one: the method that is the FFN sublayer."""
    outer_dropout: str = ""
    """To the dropout behind the FFN: a module, or a probability of the block's."""
    inner_dropout: str = ""
    """To the one in front of ``w_out``."""
    container: str = ""
    """The module around ``w_in``, if there is one, and the classes whose weights tell all."""
    container_classes: tuple[str, ...] = ()
    w_gate: str = ""
    """To the product beside ``w_in``, if there is one."""
    fused: str = ""
    """``"in_gate"`` or ``"gate_in"``: ``w_in`` is both products in one matrix, in this order."""
    norm: str = ""
    """To the sublayer's norm; empty where the block has it (and the residual) outside of it."""
    norm_class: str = "LayerNorm"
    norm_kind: str = "layer"
    """``"layer"`` or ``"rms"``."""
    eps: tuple[str, ...] = ("eps",)
    """The norm's epsilon: the first of these attributes that is there."""
    residual: bool | None = None
    """Whether the sublayer adds its input; by default where it has a norm."""
    post_norm: bool = False
    """Whether the norm is applied to ``x + FFN(x)``."""
    bypassed: tuple[str, ...] = ()
    """What the kernels replace: nobody may have hooked it."""
    inner_size: str = "intermediate_size"
    """Where the configuration has the FFN's inner size."""
    inner_blocks: str = ""
    """From each of ``blocks`` to its own blocks, where they are groups of them."""
    passes: str = ""
    """Where the configuration has the number of runs, where each of ``blocks`` runs several times
    in turn."""
    mask: str = "attention_mask"
    """The argument of the encoder's ``forward`` that is 1 for tokens and 0 for padding."""
    pads: str = ""
    """Where the configuration has what the encoder pads rows to a multiple of, if it does."""
    appends: bool = False
    """Whether the encoder puts real tokens of its own behind those of the mask (image patches)."""
    uncounted: str = ""
    """What :func:`flops.count` does not know of the encoder, in words: it refuses then. It knows
    embeddings, what ``attention`` describes (full attention, where there is none) and what lies
    around."""
    keep_first: int = 0
    """How many first tokens of a row new plugins keep whole, where nobody says."""
    block_norms: tuple[str, ...] = ()
    """From a block to norms outside of its sublayers, by the root mean square and a plain weight:
    they go faster beside compressed sublayers."""
    block_norm_class: str = ""
    decoder: bool = False
    """Whether tokens see none behind them, and a cache holds their keys: the FFN is compressed in
    a prompt alone then, and merged keys are as causal as plain ones."""
    attention: AttentionPaths | None = None
    """Its self-attention sublayers, for the placements ``attention`` and ``attention_kv``."""
    other_attention: tuple[AttentionPaths, ...] = ()
    """The same of models that are configured to sublayers of another class."""
    no_attention: str = ""
    """Why it has none that these placements could work at, in words."""

    def __post_init__(self) -> None:
        if isinstance(self.w_in, str):
            object.__setattr__(self, "w_in", (self.w_in,))
        for field in fields(self):
            if field.name == "other_attention":
                continue
            check_type(f"family.{field.name}", str(field.type), getattr(self, field.name))
        if not isinstance(self.attention, AttentionPaths | None):
            raise TypeError(f"family.attention must be AttentionPaths, got {self.attention!r}")
        if not all(isinstance(paths, AttentionPaths) for paths in self.other_attention):
            raise TypeError(
                f"family.other_attention must be AttentionPaths, got {self.other_attention!r}"
            )
        for name in ("name", "module", "encoder", "block", "layer", "w_out", "method", "mask"):
            if not getattr(self, name):
                raise ValueError(f"family.{name} must not be empty")
        if not self.w_in or not all(self.w_in):
            raise ValueError("family.w_in must name a path")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"family.{name} must be one of {known}, got {getattr(self, name)!r}"
                )
        if bool(self.act) == bool(self.activation):
            raise ValueError(
                "family must have either act, the path of the activation module, or activation, "
                f"the name of a function, got {self.act!r} and {self.activation!r}"
            )
        if self.fused and self.w_gate:
            raise ValueError("family.w_gate must be empty where fused says that w_in has the gate")
        if self.post_norm and not (self.norm and self.adds):
            raise ValueError("family.norm must be a path, and residual not False, with post_norm")
        inside = self.layer == self.block
        if inside and not self.steps:
            raise ValueError("family.steps must name the FFN's modules where layer is the block")
        if self.called and not inside:
            raise ValueError(
                "family.called is for an FFN that is no module: layer must be block, "
                f"{self.block!r}, got {self.layer!r}"
            )
        if inside and self.sublayer:
            raise ValueError(f"family.sublayer must be empty: block {self.block!r} is the layer")

    def forms(self) -> tuple[Family, ...]:
        """The family, one for each kind of attention that its models may have."""
        others = (replace(self, attention=p, other_attention=()) for p in self.other_attention)
        return self, *others

    @property
    def adds(self) -> bool:
        """Whether the sublayer adds its input."""
        return bool(self.norm) if self.residual is None else self.residual


ORIGINAL = "variator_original"
"""Class attribute of a patched class: the class it replaces."""
REACH = "variator_reach"
"""Attribute of a patched self-attention sublayer: what it needs of its encoder."""
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


def blocks_of(encoder: Any, family: Family) -> list[Any]:
    """The encoder's blocks, in the order in which they run: a shared one is there at every use."""
    blocks = list(follow(encoder, family.blocks))
    if family.passes:
        runs = follow(encoder.config, family.passes)
        blocks = [blocks[int(i / (runs / len(blocks)))] for i in range(runs)]
    if family.inner_blocks:
        blocks = [block for group in blocks for block in follow(group, family.inner_blocks)]
    return blocks
