"""Where a family keeps its self-attention sublayers, as data."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .fields import CHOICES, check_type
from .term_paths import DistancePaths, GlobalPaths, PlacePaths


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
    heads: str = ""
    """To their number; times their size it must be what the last product reads."""
    causal: str = "is_causal"
    """To whether queries see no later token, where a module says so."""
    key_heads: str = ""
    """To the number of heads of keys, where one product for all goes by it."""
    q: str = ""
    """To the products of queries, keys and values."""
    k: str = ""
    v: str = ""
    qkv: str = ""
    """Instead: to one product for all three, in this order."""
    qkv_heads: bool = False
    """Whether that one has them head by head."""
    q_bias: str = ""
    """To biases beside it."""
    v_bias: str = ""
    scale: float = 0.0
    """Of the scores; 0: one over the root of the head's size."""
    scaling: str = ""
    """To that scale, where a module has it."""
    scales_scaled: bool = False
    """Whether that one multiplies the usual scale in the place of being it."""
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
    sines: str = ""
    """Instead of ``rotary``: to a table with a row a position, sines and behind them cosines, by
    which neighbours in a head turn (RoFormer)."""
    turned: str = "position_embeddings"
    """The argument of the sublayer that brings cosines and sines, or rows of the table."""
    turns: str = ""
    """To whether the sublayer does turn, where not every one of a model does."""
    window: str = ""
    """To the number of tokens on either side, its own place included, that a query sees."""
    window_of: str = ""
    """From the encoder to the tokens on both sides that its masks show, where those decide."""
    local_block: str = ""
    """To the number of tokens of a block, where queries of the dense sublayer meet the keys of
    their block and of its two neighbours alone (LongT5); :mod:`~variator_kernels.flops` counts
    so."""
    sliding: str = ""
    """Of a decoder: to the number of tokens that a query sees; a layer in which there is one stays
    dense."""
    distances: DistancePaths | None = None
    """Terms of content and distance."""
    global_keys: GlobalPaths | None = None
    """Keys of blocks of tokens."""
    places: tuple[PlacePaths, ...] = ()
    """Tables over places that are not columns."""
    carrier: str = ""
    """From the encoder to the module on the way to the blocks that gets ``places``, its class."""
    carrier_class: str = ""
    inner: str = ""
    """To a module of the sublayer that may be of several classes, and the one that fits."""
    inner_class: str = ""
    mixes: tuple[str, ...] = ()
    """To products over the heads that each pair of a query and a key goes through, where a model
    has them (talking heads): merged keys do not know them."""
    absent: tuple[str, ...] = ()
    """What must be None, False or not there: merged keys do not know it."""
    encoder_absent: tuple[str, ...] = ()
    """The same of paths from the encoder."""
    returns: tuple[str, ...] = ("",)
    """What the sublayer's ``forward`` gives behind its output: arguments of its own by name, or
    nothing. One that is annotated to return a tensor gives that alone; so does one with an empty
    ``returns`` that nobody can ask for weights (``output_attentions``)."""

    def __post_init__(self) -> None:
        if not isinstance(self.distances, DistancePaths | None):
            raise TypeError(
                f"family.attention.distances must be DistancePaths, got {self.distances!r}"
            )
        if not isinstance(self.global_keys, GlobalPaths | None):
            raise TypeError(
                f"family.attention.global_keys must be GlobalPaths, got {self.global_keys!r}"
            )
        if not all(isinstance(place, PlacePaths) for place in self.places):
            raise TypeError(f"family.attention.places must be PlacePaths, got {self.places!r}")
        for field in fields(self):
            if field.name == "places":
                continue
            check_type(f"family.attention.{field.name}", str(field.type), getattr(self, field.name))
        for name in ("sublayer", "layer", "head_size", "o"):
            if not getattr(self, name):
                raise ValueError(f"family.attention.{name} must not be empty")
        if bool(self.qkv) == bool(self.q and self.k and self.v):
            raise ValueError(
                "family.attention must have q, k and v, or qkv, one product for all three"
            )
        if len({bool(self.places), bool(self.carrier), bool(self.carrier_class)}) > 1:
            raise ValueError(
                "family.attention.places need carrier and carrier_class, which need places"
            )
        if self.global_keys and (self.distances or self.places):
            raise ValueError("family.attention.global_keys do not go with distances or places")
        if bool(self.inner) != bool(self.inner_class):
            raise ValueError("family.attention: inner and inner_class go together")
        if self.rotary and self.sines:
            raise ValueError("family.attention must have rotary or sines, got both")
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
        apart = self.distances
        of_distances = () if apart is None else (apart.kinds, apart.used, apart.shared)
        numbers = [
            self.causal,
            self.head_size,
            self.heads,
            self.key_heads,
            self.window,
            self.scaling,
            self.sliding,
            self.turns,
        ]
        numbers += [] if self.global_keys is None else [self.global_keys.size]
        return (*numbers, *of_distances, *self.mixes, *self.absent)

    @property
    def carried(self) -> tuple[str, ...]:
        """The arguments of ``carrier`` that sublayers need."""
        return tuple(dict.fromkeys(place.places for place in self.places))
