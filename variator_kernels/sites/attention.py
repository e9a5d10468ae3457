"""What a self-attention sublayer of a known family consists of, as a :class:`SelfAttention`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.int8_linear.module import StoredProduct
from ..ops.self_attention import Projections, Rotation, SelfAttention, Table
from ..ops.transforms import tracing
from .attention_paths import AttentionPaths
from .described import Described, memory_of
from .family import REACH, ROW, Family, follow, lookup
from .feed_forward import check_bypassed, probability
from .plain import plain_embedding, plain_linear
from .quantised import stored_product, watch_stored
from .watch import Watch
from .wrappers import check_present


class Reach(NamedTuple):
    """What a sublayer needs of the encoder that it is in: looked up when it is, for somebody may
    replace it."""

    owner: Any
    """What the paths begin at."""
    table_path: str = ""
    max_distance: int = 128
    rotary_path: str = ""
    rotary_kind: str | None = None

    @property
    def table(self) -> Any:
        """The embedding of T5's distances."""
        return follow(self.owner, self.table_path) if self.table_path else None

    @property
    def rotary(self) -> Any:
        """The module that turns positions into cosines and sines."""
        return follow(self.owner, self.rotary_path) if self.rotary_path else None

    def distances(self, like: Tensor, table: Any = None) -> Table | None:
        """T5's table on the device of ``like``; as it is looked up, where it is not a plain one.
        ``table``: :attr:`table`, of a caller that has it."""
        table = self.table if table is None else table
        if table is None:
            return None
        weight = table.weight
        if not plain_embedding(table):
            weight = table(torch.arange(weight.shape[0], device=weight.device))
        return Table(weight.to(like.device), self.max_distance)

    def rotation(self, x: Tensor, positions: Tensor) -> Rotation:
        """Of ``positions [B, m]``, which need not be whole numbers."""
        extra = () if self.rotary_kind is None else (self.rotary_kind,)
        return Rotation(*self.rotary(x, positions, *extra))


class DescribedAttention(Described[SelfAttention]):
    """A self-attention sublayer's :func:`describe_attention`."""

    __slots__ = ()

    @staticmethod
    def describe(layer: nn.Module) -> SelfAttention:
        return describe_attention(layer, getattr(type(layer), ROW))

    @staticmethod
    def watched(layer: nn.Module) -> Watch:
        return _watched(layer, paths_of(layer))

    @staticmethod
    def memory(layer: nn.Module) -> tuple[Any, ...] | None:
        paths = paths_of(layer)
        weight = lookup(layer, f"{paths.qkv}.weight") if paths.qkv else None
        return memory_of(weight) if isinstance(weight, Tensor) else None


def paths_of(layer: nn.Module) -> AttentionPaths:
    """Those of a patched sublayer."""
    family: Family = getattr(type(layer), ROW)
    assert family.attention is not None
    return family.attention


def reach_of(layer: nn.Module) -> Reach:
    """What a patched sublayer needs of its encoder."""
    return vars(layer)[REACH]


def reach(encoder: Any, block: Any, number: int, paths: AttentionPaths) -> Reach:
    """What the sublayer of ``block``, the ``number``th, needs."""
    found = Reach(
        encoder,
        paths.table.format(layer=number),
        getattr(encoder.config, "relative_attention_max_distance", 128),
        paths.rotary,
        lookup(block, paths.rotary_kind),
    )
    _ = found.table, found.rotary  # they are there
    return found


def _watched(layer: nn.Module, paths: AttentionPaths) -> Watch:
    watch = Watch()
    products = (paths.q, paths.k, paths.v, paths.qkv, paths.o)
    norms = paths.norm, paths.q_norm, paths.k_norm
    named = {*products, *norms, paths.dropout, paths.outer_dropout, *paths.bypassed} - {""}
    ends = [watch.path(layer, path) for path in sorted(named)]
    for path in (paths.dropout, paths.outer_dropout, *paths.numbers):
        owner, name = _owner(layer, path)
        if isinstance(owner, nn.Module) and name in vars(owner):
            watch.entries(vars(owner), (name, "training"))
    for module in {id(end): end for end in ends if isinstance(end, nn.Module)}.values():
        mode = ("training", "p") if hasattr(module, "p") else ()
        watch.module(module, (*mode, "weight", "bias", *paths.eps))
        watch_stored(watch, module)
    watch.entries(vars(layer), ("training",))
    watch.start()
    return watch


def _owner(layer: nn.Module, path: str) -> tuple[Any, str]:
    """The module whose attribute ``path`` ends in, and that attribute's name."""
    above, _, name = path.rpartition(".")
    return (lookup(layer, above) if above else layer), name


def describe_attention(layer: nn.Module, family: Family) -> SelfAttention:
    """What ``layer`` consists of now; traceable by ``torch.compile``.

    Raises:
        TypeError: what the kernels replace (its norm, its dropout) was replaced or hooked.
        ValueError: accelerate offloads it.
    """
    paths = family.attention
    assert paths is not None
    check_present(layer)
    check_bypassed(layer, paths.bypassed, family.module)
    size = follow(layer, paths.head_size)
    o = follow(layer, paths.o)
    norm = lookup(layer, paths.norm)
    window = lookup(layer, paths.window)
    stand_in = next(p for p in (*layer.parameters(), torch.empty(0)) if p.is_floating_point())
    found = SelfAttention(
        *(stand_in,) * 4,
        head_size=size,
        scale=lookup(layer, paths.scaling) or paths.scale or 1 / math.sqrt(size),
        post_norm=paths.post_norm,
        residual=paths.adds,
        dropout_weights=probability(*_owner(layer, paths.dropout)),
        dropout_outer=probability(layer, paths.outer_dropout),
        q_norm=_norm(lookup(layer, paths.q_norm), size),
        k_norm=_norm(lookup(layer, paths.k_norm), size),
        window=None if window is None else (window - 1, window - 1),
    )
    if norm is not None:
        found = found._replace(
            norm=paths.norm_kind,
            norm_weight=norm.weight,
            norm_bias=getattr(norm, "bias", None),
            eps=next(getattr(norm, name) for name in paths.eps if hasattr(norm, name)),
        )
    products = [follow(layer, path) for path in (paths.q, paths.k, paths.v, paths.qkv) if path]
    if not all(map(plain_linear, (*products, o))):
        return found._replace(modules=_modules(*_stored(layer, products, o), o.in_features))
    weights = [product.weight for product in products]
    biases = [product.bias for product in products]
    if paths.qkv:
        sizes = _split(weights[0].shape[0], o.in_features)
        weights = list(weights[0].split(sizes))
        biases = [None] * 3 if biases[0] is None else list(biases[0].split(sizes))
    return found._replace(
        **dict(zip(("w_q", "w_k", "w_v"), weights, strict=True)),
        **dict(zip(("b_q", "b_k", "b_v"), biases, strict=True)),
        w_o=o.weight,
        b_o=o.bias,
    )


def _split(outputs: int, queries: int) -> list[int]:
    """The outputs of one product for queries, keys and values."""
    keys = (outputs - queries) // 2
    return [queries, keys, keys]


def _stored(layer: nn.Module, products: list[Any], o: Any) -> tuple[list[Any], Any]:
    """In their place what runs of those whose weights came in int8, in inference."""
    if layer.training or torch.compiler.is_compiling() or tracing():
        return products, o
    found = [stored_product(product) for product in (*products, o)]
    every = [
        product if isinstance(read, str) else read
        for product, read in zip((*products, o), found, strict=True)
    ]
    return every[:-1], every[-1]


def _modules(products: list[Any], o: Any, queries: int) -> Projections:
    if len(products) == 3:
        return Projections(products[0], products[1], products[2], o)
    if isinstance(products[0], StoredProduct):
        ends = accumulate(_split(len(products[0].weight.numbers), queries), initial=0)
        parts: list[Any] = [products[0].part(*both) for both in pairwise(ends)]
        return Projections._make([*parts, o])

    def part(number: int) -> Callable[[Tensor], Tensor]:
        def project(x: Tensor) -> Tensor:
            every = products[0](x)
            return every.split(_split(every.shape[-1], queries), -1)[number]

        return project

    return Projections(part(0), part(1), part(2), o)


def _norm(norm: Any, size: int) -> Callable[[Tensor], Tensor] | None:
    """Of ``[..., H, size]``: a module over a head, or over all of them (OLMo 2)."""
    if norm is None or norm.weight.shape[0] == size:
        return norm
    return lambda heads: norm(heads.flatten(-2)).unflatten(-1, (-1, size))
