"""The widths of a model: which of its parameters lie along the residual stream, and which along an
FFN's inner neurons. Families are rows of data in :mod:`.residual_rows`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

HIDDEN, FFN, WHOLE = "hidden", "ffn", ""
"""What a dimension of a parameter runs along: the residual stream, FFN neurons, neither."""


@dataclass(frozen=True)
class Part:
    """A sublayer of a block: a norm of the stream, what reads it, and what writes to the stream.
    Paths are dotted, from the block; one that a block does not have is left out."""

    norm: str
    reads: tuple[str, ...]
    writes: str
    inner: bool = False
    """Whether between ``reads`` and ``writes`` lie an FFN's neurons."""
    memory: tuple[str, ...] = ()
    """What reads another stack's last hidden states (cross-attention)."""


@dataclass(frozen=True)
class Stack:
    """Blocks that share one residual stream."""

    root: str
    """From the base model; empty is the base model itself."""
    blocks: str
    parts: tuple[Part, ...]
    norm: str
    """The one behind the last block."""


@dataclass(frozen=True)
class Residual:
    """A family whose stream can be made narrower."""

    name: str
    """``config.model_type``"""
    classes: tuple[str, ...]
    """Of models, by the name of their class."""
    stacks: tuple[Stack, ...]
    heads: tuple[str, ...]
    """From the model to linear layers that read the last stack's output."""
    hidden: str = "hidden_size"
    ffn: str = "intermediate_size"
    """Where the configuration has the sizes."""
    head_size: str = "head_dim"
    """Where it has, or takes, that of an attention head."""
    gain_offset: float = 0.0
    """What a norm multiplies by beyond its weight."""
    unties: bool = True
    """Whether its configuration can say that the head's weight is its own."""


class Sublayer(NamedTuple):
    """A :class:`Part` in a model: modules by their full names. Without a norm (BERT) the stream
    bears no change."""

    norm: str
    reads: tuple[str, ...]
    writes: str
    inner: bool
    memory: tuple[str, ...]


class Block(NamedTuple):
    name: str
    sublayers: tuple[Sublayer, ...]


class Blocks(NamedTuple):
    """A :class:`Stack` in a model."""

    root: str
    blocks: tuple[Block, ...]
    norm: str


@dataclass
class Layout:
    """What of a model lies along its stream and its FFNs, by names that a narrower model of the
    same class has too."""

    family: str
    stacks: tuple[Blocks, ...]
    embeddings: tuple[str, ...] = ()
    """Modules that write the stream by look-up; all hold one weight."""
    head: str = ""
    """The linear layer that reads the last norm, if there is one."""
    tied: bool = False
    """Whether the head's weight is the embedding."""
    residual: Residual | None = None
    """None: the stream keeps its width, ``fixed`` says why."""
    fixed: str = ""
    hidden_field: str = "hidden_size"
    ffn_field: str = "intermediate_size"
    roles: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For each parameter that has one, what its dimensions run along."""

    @property
    def sublayers(self) -> Iterator[Sublayer]:
        for stack in self.stacks:
            for block in stack.blocks:
                yield from block.sublayers

    @property
    def gated(self) -> bool:
        """Whether FFNs have a product of two halves."""
        return any(len(part.reads) > 1 for part in self.sublayers if part.inner)

    def last_norms(self) -> list[tuple[str, tuple[str, ...]]]:
        """Each stack's last norm with what reads it."""
        found = []
        for position, stack in enumerate(self.stacks):
            later = self.stacks[position + 1 :]
            reads = [
                name
                for other in later
                for block in other.blocks
                for part in block.sublayers
                for name in part.memory
            ]
            if self.head and not later:
                reads.append(self.head)
            found.append((stack.norm, tuple(reads)))
        return found


def set_roles(layout: Layout, model: nn.Module) -> None:
    """Fill ``layout.roles`` from its names."""
    wide = HIDDEN if layout.residual is not None else WHOLE
    roles = layout.roles

    def linear(name: str, out: str, inside: str) -> None:
        roles[f"{name}.weight"] = (out, inside)
        if getattr(model.get_submodule(name), "bias", None) is not None:
            roles[f"{name}.bias"] = (out,)

    for part in layout.sublayers:
        inner = FFN if part.inner else WHOLE
        for name in part.reads:
            linear(name, inner, wide)
        for name in part.memory:
            linear(name, WHOLE, wide)
        linear(part.writes, wide, inner)
        if part.norm and wide:
            roles[f"{part.norm}.weight"] = (wide,)
    if wide:
        for stack in layout.stacks:
            roles[f"{stack.norm}.weight"] = (wide,)
        for name in layout.embeddings:
            roles[f"{name}.weight"] = (WHOLE, wide)
        if layout.head:
            linear(layout.head, WHOLE, wide)


def names_of(weight: Tensor, model: nn.Module) -> tuple[str, ...]:
    """All modules whose ``weight`` this is; one that has several names, by each."""
    every = model.named_modules(remove_duplicate=False)
    return tuple(name for name, module in every if getattr(module, "weight", None) is weight)
