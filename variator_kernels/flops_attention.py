"""What attention costs beside its four products: scores and weighted sums, terms of distances."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .flops_lora import low_rank
from .sites.attention_paths import AttentionPaths
from .sites.family import follow, lookup
from .sites.found import Found


class Distances(NamedTuple):
    """Terms of content and distance (DeBERTa)."""

    vectors: int
    """Of distances."""
    of_row: bool
    """Whether the dense sublayer multiplies those in a row alone."""
    dense: int
    """Multiply-adds a vector, in the dense sublayer and in ours."""
    ours: int
    parameters: int
    content: int
    """Whether queries meet vectors (c2p), and whether keys do (p2c): 0 or 1."""
    position: int


class Core(NamedTuple):
    """Of one sublayer, whose heads together are ``width`` wide."""

    hidden: int
    width: int
    local_block: int = 0
    """Tokens of a block, where the dense sublayer attends to three of them; 0: to all keys."""
    global_block: int = 0
    """Tokens that have a global key; 0: there are none."""
    mixes: int = 0
    """Multiply-adds a pair in products over the heads."""
    distances: Distances | None = None

    @property
    def parameters(self) -> int:
        """Weights beside those of the four products."""
        return 0 if self.distances is None else self.distances.parameters

    def global_keys(self, n: int) -> int:
        """Of a row of n tokens."""
        return n // self.global_block if self.global_block else 0

    def cost(
        self, queries: int, keys: int, pairs: int, further: int, dense: bool
    ) -> tuple[int, int]:
        """Multiply-adds of a row with so many ``pairs`` of a query and a key, beside ``further``
        global keys, and those that all rows share. ``dense``: as the model itself computes."""
        met, macs = queries, 0
        if dense and self.local_block:
            met = -(-queries // self.local_block) * self.local_block  # blocks are whole
            pairs = met * 3 * self.local_block
        if dense:
            macs = queries * further * self.hidden  # sums of blocks, by a product
        macs += (pairs + met * further) * (2 * self.width + self.mixes)
        apart = self.distances
        if apart is None:
            return macs, 0
        vectors = apart.vectors
        if dense and apart.of_row:
            vectors = 2 * min(queries, vectors // 2)
        meet = apart.content * queries + apart.position * keys
        macs += meet * vectors * self.width
        return macs, vectors * (apart.dense if dense else apart.ours)


def unknown(found: Found) -> str:
    """What there is in the encoder that nobody counts, in words; empty: nothing."""
    paths = found.family.attention
    if found.family.uncounted or paths is None:
        return found.family.uncounted
    for layer in found.attentions:
        inner = type(follow(layer, paths.inner)).__name__ if paths.inner else ""
        if inner != paths.inner_class:
            return f"a {inner}"
        if paths.local_block and lookup(layer, paths.local_block) is None:
            return f"a {type(layer).__name__}"
    return ""


def core(found: Found, number: int, width: int) -> Core:
    """Of the ``number``th block."""
    paths = found.family.attention
    if paths is None:
        return Core(found.hidden_size, width)
    layer = found.attentions[number]
    mixes = [lookup(layer, path) for path in paths.mixes]
    size = "" if paths.global_keys is None else paths.global_keys.size
    return Core(
        found.hidden_size,
        width,
        lookup(layer, paths.local_block) or 0,
        lookup(layer, size) or 0,
        sum(low_rank([m]).macs + m.in_features * m.out_features for m in mixes if m is not None),
        _distances(found, layer, paths, width),
    )


def _distances(found: Found, layer: object, paths: AttentionPaths, width: int) -> Distances | None:
    apart = paths.distances
    if apart is None or not lookup(layer, apart.used):
        return None
    kinds = lookup(layer, apart.kinds) or ()
    content, position = "c2p" in kinds, "p2c" in kinds
    if not (content or position):
        return None
    own = [lookup(layer, path) for path in (apart.k, apart.q)]
    shared = own == [None, None]  # the tokens' products: transformers makes both then
    runs = [lookup(layer, path) for path in (paths.k, paths.q)] if shared else own
    each = [found.hidden_size * width + low_rank([module]).macs for module in runs]
    ours = content * each[0] + position * each[1]
    vectors = follow(found.encoder, apart.vectors)
    vectors = vectors if isinstance(vectors, Tensor) else vectors()
    parameters = sum(found.hidden_size * width for m in own if m is not None)
    return Distances(
        vectors.shape[0],
        apart.of_row,
        sum(each) if shared else ours,
        ours,
        parameters,
        int(content),
        int(position),
    )
