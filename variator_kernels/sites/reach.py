"""What a self-attention sublayer needs of the encoder around it: tables, rotations, positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.self_attention import (
    BlockTable,
    Distances,
    PlaceTable,
    Rotation,
    SelfAttention,
    Table,
    Terms,
    turned_between,
)
from .attention_paths import AttentionPaths
from .family import REACH, follow, lookup
from .plain import plain_embedding

_WRONG = "{} must be {}, the rows of the table, where attention is compressed, got {}"


def _last(path: str) -> str:
    """The name at the end of a path."""
    return path.rpartition(".")[2]


def _either(window: tuple[int, int]) -> tuple[int, int]:
    """How many tokens on both sides a window may be said to have: half of an odd number is cut."""
    return 2 * window[0], 2 * window[0] + 1


class Reach(NamedTuple):
    """What a sublayer needs of the encoder that it is in: looked up when it is, for somebody may
    replace it."""

    owner: Any
    """What the paths begin at."""
    paths: AttentionPaths
    table_path: str = ""
    max_distance: int = 128
    rotary_kind: str | None = None
    sublayer: Any = None
    """Where it has terms that the encoder's arguments and numbers decide."""

    @property
    def table(self) -> Any:
        """The embedding of T5's distances."""
        return follow(self.owner, self.table_path) if self.table_path else None

    @property
    def global_table(self) -> Any:
        """The embedding of distances between blocks of tokens."""
        paths = self.paths.global_keys
        return None if paths is None else follow(self.owner, paths.table)

    @property
    def lent(self) -> dict[str, Any]:
        """The tables that a sublayer looks for in itself, by their names there: where the first
        block is compressed, another makes the bias."""
        if not self.paths.table_of:
            return {}
        found = {self.table_path.rpartition(".")[2]: self.table}
        if self.paths.global_keys is not None:
            found[self.paths.global_keys.table.rpartition(".")[2]] = self.global_table
        return found

    @property
    def rotary(self) -> Any:
        """The module that turns positions into cosines and sines, or the table that has them."""
        path = self.paths.rotary or self.paths.sines
        return follow(self.owner, path) if path else None

    def distances(self, like: Tensor, table: Any = None) -> Table | None:
        """T5's table on the device of ``like``; as it is looked up, where it is not a plain one.
        ``table``: :attr:`table`, of a caller that has it."""
        table = self.table if table is None else table
        return None if table is None else self._of(table, self.table_path, like)

    def _of(self, table: Any, path: str, like: Tensor) -> Table:
        weight = table.weight
        if not plain_embedding(table):
            weight = table(torch.arange(weight.shape[0], device=weight.device))
        own = self._maker(path)
        if not getattr(own, "has_relative_attention_bias", True):
            raise ValueError(
                "has_relative_attention_bias must be True of the layer that has the table of "
                "distances, where attention is compressed, got False"
            )
        most = getattr(own, "relative_attention_max_distance", self.max_distance)
        buckets = getattr(own, "relative_attention_num_buckets", weight.shape[0])
        if buckets != weight.shape[0]:
            raise ValueError(
                _WRONG.format("relative_attention_num_buckets", weight.shape[0], buckets)
            )
        return Table(weight.to(like.device), most)

    def _maker(self, path: str) -> Any:
        """The module that has the table at ``path``; a ModuleList names its children by index."""
        return lookup(self.owner, path.rpartition(".")[0])

    def check_lent(self, inner: nn.Module) -> None:
        """A bias that ``inner`` makes of a table that is not its own is the bias that its owner
        would make.

        Raises:
            ValueError: they would count distances in other ways.
        """
        own = self._maker(self.table_path)
        for name in ("relative_attention_max_distance", "relative_attention_num_buckets"):
            here, there = getattr(inner, name, None), getattr(own, name, None)
            if here != there:
                raise ValueError(
                    f"{name} must be the same in all layers where attention is compressed in the "
                    f"first, whose bias they share, got {there} there and {here}"
                )

    def terms(
        self,
        x: Tensor,
        attention: SelfAttention,
        carried: Mapping[str, Tensor],
        table: Any = None,
    ) -> Terms:
        """The additive terms of ``attention``, a description of the sublayer, for ``x [B, n, d]``.
        ``carried``: what the paths' carrier got. ``table`` as in :meth:`distances`."""
        vectors = None if attention.of_distances is None else self._vectors(x)
        places = []
        for place in self.paths.places:
            there = [lookup(self.owner, path) for path in place.used]
            if not all(there + [lookup(self.sublayer, path) for path in place.here]):
                continue
            where = carried[place.places].to(x.device)
            # As transformers, which gives these tables no gradient.
            weight = follow(self.owner, place.weight).detach().to(x.device).t() * attention.scale
            buckets = lookup(self.owner, place.buckets)
            if buckets not in (None, weight.shape[0]):
                raise ValueError(_WRONG.format(_last(place.buckets), weight.shape[0], buckets))
            most = Table(weight, int(follow(self.owner, place.max_distance)))
            places.append(PlaceTable(most, where if where.dim() == 2 else where[..., place.column]))
        shown = lookup(self.owner, self.paths.window_of)
        if attention.window is not None and shown not in (None, *_either(attention.window)):
            raise ValueError(
                f"{_last(self.paths.window_of)} must be {2 * attention.window[0]}, as layers say, "
                f"where attention is compressed, got {shown}"
            )
        blocks = None
        if attention.global_keys is not None:
            assert self.paths.global_keys is not None
            between = self._of(self.global_table, self.paths.global_keys.table, x)
            blocks = BlockTable(between, attention.global_keys.size)
        return Terms(self.distances(x, table), attention.window, tuple(places), vectors, blocks)

    def _vectors(self, like: Tensor) -> Distances:
        """What terms of content and distance read, as the encoder and the sublayer say it now."""
        paths = self.paths.distances
        assert paths is not None
        found = follow(self.owner, paths.vectors)
        found = found if isinstance(found, Tensor) else found()
        if found is None:
            raise ValueError(
                f"{paths.vectors} must give the vectors of distances where {_last(paths.used)} of "
                "attention that is compressed is on, got None"
            )
        found = found.to(like.device)
        span = lookup(self.sublayer, paths.span)
        if span is not None:
            if 2 * span > found.shape[0]:
                raise ValueError(
                    f"{_last(paths.span)} must be at most {found.shape[0] // 2}, half the vectors "
                    f"of distances, where attention is compressed, got {span}"
                )
            found = found[: 2 * span]
        buckets, most = (lookup(self.owner, p) or 0 for p in (paths.buckets, paths.max_distance))
        if buckets == 1:
            raise ValueError(
                f"{_last(paths.buckets)} must be at least 2, or none, where attention is "
                "compressed, got 1"
            )
        return Distances(found, buckets, most)

    def rotation(self, x: Tensor, positions: Tensor) -> Rotation:
        """Of ``positions [B, m]``, which need not be whole numbers."""
        if self.paths.sines:
            # Its gradient would be of places between two of its rows: transformers gives it none.
            return turned_between(self.rotary.weight.detach().to(x), positions.to(x.device))
        extra = () if self.rotary_kind is None else (self.rotary_kind,)
        return Rotation(*self.rotary(x, positions, *extra))

    def given_rotation(self, turned: Any) -> Rotation | None:
        """What the sublayer got for whole positions, as :attr:`AttentionPaths.turned` says."""
        if turned is None or not isinstance(turned, Tensor):
            return None if turned is None else Rotation(turned[0], turned[1])
        sin, cos = turned[:, 0].chunk(2, -1)  # all heads turn alike
        return Rotation(torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), neighbours=True)


def reach_of(layer: nn.Module) -> Reach:
    """What a patched sublayer needs of its encoder."""
    return vars(layer)[REACH]


def reach(encoder: Any, block: Any, number: int, paths: AttentionPaths) -> Reach:
    """What the sublayer of ``block``, the ``number``th, needs."""
    apart = paths.distances
    found = Reach(
        encoder,
        paths,
        paths.table.format(layer=number),
        getattr(encoder.config, "relative_attention_max_distance", 128),
        lookup(block, paths.rotary_kind),
        follow(block, paths.sublayer) if apart is not None or paths.places else None,
    )
    _ = found.table, found.global_table, found.rotary  # they are there
    if apart is not None and lookup(found.sublayer, apart.used):
        for path in (apart.vectors, apart.buckets, apart.max_distance):
            follow(encoder, path)
    for place in paths.places:
        if all(lookup(encoder, path) for path in place.used):
            follow(encoder, place.weight)
            follow(encoder, place.max_distance)
    return found
