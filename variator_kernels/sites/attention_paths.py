"""Where a family keeps its self-attention sublayers, as data."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .fields import CHOICES, check_type


@dataclass(frozen=True)
class AttentionPaths:
    """Where a family keeps its self-attention sublayers: a module, with norm and residual or alone.

    Paths as in :class:`~.family.Family`, from the sublayer unless it is said otherwise.
    """

    sublayer: str
    """From a block to the sublayer."""
    layer: str
    """Its class."""
    head_size: str
    """To the size of a head."""
    o: str
    """To the last product."""
    q: str = ""
    """To the products of queries, keys and values."""
    k: str = ""
    v: str = ""
    qkv: str = ""
    """Instead: to one product for all three, in this order."""
    scale: float = 0.0
    """Of the scores; 0: one over the root of the head's size."""
    scaling: str = ""
    """To that scale, where a module has it."""
    q_norm: str = ""
    """To the norms of queries and keys, over a head or over all of them."""
    k_norm: str = ""
    dropout: str = ""
    """To the dropout of attention's weights: a module, or a probability."""
    outer_dropout: str = ""
    """To the dropout behind ``o``."""
    norm: str = ""
    """To the sublayer's norm; empty where the block has it (and the residual) outside of it."""
    norm_kind: str = "layer"
    eps: tuple[str, ...] = ("eps",)
    residual: bool | None = None
    """Whether the sublayer adds its input; by default where it has a norm."""
    post_norm: bool = False
    bypassed: tuple[str, ...] = ()
    """What the kernels replace: nobody may have hooked it."""
    table: str = ""
    """From the encoder to T5's table of distances; ``{layer}`` is the block's number."""
    table_of: str = ""
    """To the module that looks for a shared table in itself, where only the first block has it."""
    rotary: str = ""
    """From the encoder to the module that turns positions into cosines and sines (RoPE)."""
    rotary_kind: str = ""
    """From the block to what that module wants besides."""
    turns: str = ""
    """To whether the sublayer does turn, where not every one of a model does."""
    window: str = ""
    """To the number of tokens on either side, its own place included, that a query sees."""
    sliding: str = ""
    """Of a decoder: to the number of tokens that a query sees; a layer in which there is one stays
    dense."""
    absent: tuple[str, ...] = ()
    """What must be None or not there: merged keys do not know it."""
    returns: tuple[str, ...] = ("",)
    """What the sublayer's ``forward`` gives behind its output: arguments of its own by name, or
    nothing. One that is annotated to return a tensor gives that alone."""

    def __post_init__(self) -> None:
        for field in fields(self):
            check_type(f"family.attention.{field.name}", str(field.type), getattr(self, field.name))
        for name in ("sublayer", "layer", "head_size", "o"):
            if not getattr(self, name):
                raise ValueError(f"family.attention.{name} must not be empty")
        if bool(self.qkv) == bool(self.q and self.k and self.v):
            raise ValueError(
                "family.attention must have q, k and v, or qkv, one product for all three"
            )
        if self.norm_kind not in CHOICES["norm_kind"]:
            raise ValueError(
                f"family.attention.norm_kind must be one of {CHOICES['norm_kind']}, got "
                f"{self.norm_kind!r}"
            )
        if self.post_norm and not (self.norm and self.adds):
            raise ValueError(
                "family.attention.norm must be a path, and residual not False, with post_norm"
            )

    @property
    def adds(self) -> bool:
        """Whether the sublayer adds its input."""
        return bool(self.norm) if self.residual is None else self.residual

    @property
    def numbers(self) -> tuple[str, ...]:
        """Paths of what is no module."""
        return self.head_size, self.window, self.scaling, self.sliding, self.turns, *self.absent
