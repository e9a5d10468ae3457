"""Where a level has a ratio."""

from __future__ import annotations

from typing import NamedTuple

PLACEMENTS = ("ffn", "attention", "attention_kv")
"""In a model's order."""


class Site(NamedTuple):
    """One place of a model at which a method can work."""

    placement: str
    """``"ffn"``: around a feed-forward sublayer. ``"attention"``: around self-attention.
    ``"attention_kv"``: in front of its keys and values."""
    layer: int
    """Of the encoder, from 0."""
