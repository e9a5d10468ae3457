"""Where a family keeps what its attention adds to scores beside T5's tables, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DistancePaths:
    """Terms of content and distance (DeBERTa): where a family keeps what they are made of.

    Paths from the sublayer, unless it is said otherwise.
    """

    vectors: str
    """From the encoder to the vectors of distances ``[2 · span, d]`` of query - key, from -span on:
    a weight, or a method that gives it."""
    kinds: str
    """To the names of the terms that there are, of ``"c2p"`` and ``"p2c"``. The scale of the scores
    counts them: it is one over the root of the head's size times one more than they are."""
    used: str
    """To whether there are any."""
    k: str
    """To the product of the vectors that queries meet (c2p); where it is missing: the tokens'."""
    q: str
    """To the product that keys meet (p2c)."""
    shared: str = ""
    """To whether the tokens' products serve for the vectors too, whatever else there is."""
    dropout: str = ""
    """To the dropout of the vectors."""
    span: str = ""
    """To how many vectors there are of distances on either side: the sublayer's part of them."""
    buckets: str = ""
    """From the encoder to how many distances have a vector: half of them their own, the others
    logarithmically; -1 or no path: each has its own."""
    max_distance: str = ""
    """From the encoder to where the last bucket begins."""
    of_row: bool = False
    """Whether the dense sublayer multiplies the vectors of the distances in a row alone, not
    all."""
    counts_all: bool = False
    """The scale counts every name, whatever it is and however often; else the two terms, once."""


@dataclass(frozen=True)
class GlobalPaths:
    """Keys beside the tokens', one for each block of a row's tokens: their normed sum (LongT5's
    transient-global attention)."""

    size: str
    """From the sublayer to the tokens of a block."""
    norm: str
    """From the sublayer to the norm of the sums, by the root mean square and a weight."""
    table: str
    """From the encoder to T5's table of distances between blocks."""


@dataclass(frozen=True)
class PlacePaths:
    """A table of T5's kind over places that the encoder gets (LayoutLMv3); paths are from it."""

    weight: str
    """To the table, ``[H, buckets]``. The scores' scale holds for its terms too."""
    places: str
    """The argument of ``AttentionPaths.carrier`` that brings them: ``[B, n]``, or ``[B, n, .]``."""
    column: int = 0
    """Which of the last dimension."""
    max_distance: str = ""
    """To where the last bucket begins."""
    used: tuple[str, ...] = ()
    """To what must all be true where the model has it."""
    here: tuple[str, ...] = ()
    """The same of a sublayer; paths from it."""
    buckets: str = ""
    """To the number of buckets, which is the table's."""
