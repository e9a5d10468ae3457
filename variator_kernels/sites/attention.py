"""What a self-attention sublayer of a known family consists of, as a :class:`SelfAttention`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.int8_linear.module import StoredProduct
from ..ops.self_attention import GlobalKeys, OfDistances, Projections, SelfAttention
from ..ops.transforms import tracing
from .attention_paths import AttentionPaths
from .attention_refusals import check_causal, check_heads, check_without
from .described import Described, memory_of
from .family import ROW, Family, follow, lookup
from .feed_forward import check_bypassed, check_norm, epsilon, probability
from .plain import plain_linear
from .quantised import stored_product, watch_stored
from .watch import Watch
from .wrappers import check_present


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


def _watched(layer: nn.Module, paths: AttentionPaths) -> Watch:
    watch = Watch()
    products = (paths.q, paths.k, paths.v, paths.qkv, paths.o)
    norms = paths.norm, paths.q_norm, paths.k_norm
    others = [paths.dropout, paths.outer_dropout, paths.q_bias, paths.v_bias]
    if paths.distances is not None:
        apart = paths.distances
        others += [path for path in (apart.k, apart.q, apart.dropout) if lookup(layer, path)]
    if paths.global_keys is not None:
        others.append(paths.global_keys.norm)
    named = {*products, *norms, *others, *paths.bypassed} - {""}
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
    if family.norm:  # else nothing says of which class this one is
        check_norm(layer, paths.norm, paths.norm_kind, family.norm_class)
    if paths.global_keys is not None:
        check_norm(layer, paths.global_keys.norm, "rms", family.norm_class)
    inner = type(follow(layer, paths.inner)).__name__
    if paths.inner and inner != paths.inner_class:
        raise TypeError(
            f"{paths.inner} must be a {paths.inner_class} where attention is compressed, got a "
            f"{inner}"
        )
    check_without(family.name, layer, (*paths.mixes, *paths.absent))
    size = follow(layer, paths.head_size)
    o = follow(layer, paths.o)
    check_heads(layer, paths.heads, o.in_features, paths.head_size)
    check_causal(layer, paths.causal, family.decoder)
    norm = lookup(layer, paths.norm)
    window = lookup(layer, paths.window)
    stand_in = next(p for p in (*layer.parameters(), torch.empty(0)) if p.is_floating_point())
    found = SelfAttention(
        *(stand_in,) * 4,
        head_size=size,
        scale=_scale(layer, paths, size),
        post_norm=paths.post_norm,
        residual=paths.adds,
        dropout_weights=probability(*_owner(layer, paths.dropout)),
        dropout_outer=probability(layer, paths.outer_dropout),
        q_norm=_norm(lookup(layer, paths.q_norm), size),
        k_norm=_norm(lookup(layer, paths.k_norm), size),
        window=None if window is None else (window - 1, window - 1),
        of_distances=_of_distances(layer, paths),
        global_keys=_global_keys(layer, paths),
    )
    if norm is not None:
        found = found._replace(
            norm=paths.norm_kind,
            norm_weight=norm.weight,
            norm_bias=getattr(norm, "bias", None),
            eps=epsilon(norm, paths.eps),
        )
    products = [follow(layer, path) for path in (paths.q, paths.k, paths.v, paths.qkv) if path]
    beside = [lookup(layer, path) for path in (paths.q_bias, "", paths.v_bias)]
    if paths.qkv_heads:
        parts = (_of_heads(products[0], size, number) for number in range(3))
        return found._replace(modules=_with_biases(Projections._make([*parts, o]), beside))
    if not all(map(plain_linear, (*products, o))):
        modules = _modules(*_stored(layer, products, o), o.in_features)
        return found._replace(modules=_with_biases(modules, beside))
    weights = [product.weight for product in products]
    biases = [product.bias for product in products]
    if paths.qkv:
        sizes = _split(weights[0].shape[0], o.in_features)
        check_heads(layer, paths.key_heads, sizes[1], paths.head_size)
        weights = list(weights[0].split(sizes))
        biases = [None] * 3 if biases[0] is None else list(biases[0].split(sizes))
    biases = [one if more is None else more for one, more in zip(biases, beside, strict=True)]
    return found._replace(
        **dict(zip(("w_q", "w_k", "w_v"), weights, strict=True)),
        **dict(zip(("b_q", "b_k", "b_v"), biases, strict=True)),
        w_o=o.weight,
        b_o=o.bias,
    )


def _scale(layer: nn.Module, paths: AttentionPaths, size: int) -> float:
    apart = paths.distances
    kinds = () if apart is None else lookup(layer, apart.kinds) or ()
    if apart is not None and not apart.counts_all:
        kinds = {"c2p", "p2c"} & {*kinds}
    own = lookup(layer, paths.scaling)
    usual = paths.scale or 1 / math.sqrt(size * (1 + len(kinds)))
    if own is None:
        return usual
    return usual * own if paths.scales_scaled else own


def _of_distances(layer: nn.Module, paths: AttentionPaths) -> OfDistances | None:
    apart = paths.distances
    if apart is None or not lookup(layer, apart.used):
        return None
    kinds = lookup(layer, apart.kinds) or ()
    if not {"c2p", "p2c"} & {*kinds}:
        return None
    k, q = (lookup(layer, path) for path in (apart.k, apart.q))
    if lookup(layer, apart.shared):
        k = q = None
    k, q = lookup(layer, paths.k) if k is None else k, lookup(layer, paths.q) if q is None else q
    dropout = probability(layer, apart.dropout)
    return OfDistances(k if "c2p" in kinds else None, q if "p2c" in kinds else None, dropout)


def _global_keys(layer: nn.Module, paths: AttentionPaths) -> GlobalKeys | None:
    where = paths.global_keys
    if where is None:
        return None
    norm = follow(layer, where.norm)
    return GlobalKeys(norm.weight, epsilon(norm, paths.eps), follow(layer, where.size))


def _of_heads(product: Any, size: int, number: int) -> Callable[[Tensor], Tensor]:
    """Queries (0), keys or values of a product that has them head by head. No view has their
    weights as a matrix: they are gathered at each call, which costs little beside the product."""

    def rows(found: Tensor) -> Tensor:
        return found.unflatten(0, (-1, 3, size))[:, number].flatten(0, 1)

    def project(x: Tensor) -> Tensor:
        if not plain_linear(product):
            return product(x).unflatten(-1, (-1, 3, size))[..., number, :].flatten(-2)
        bias = None if product.bias is None else rows(product.bias)
        return F.linear(x, rows(product.weight), bias)

    return project


def _with_biases(modules: Projections, beside: list[Any]) -> Projections:
    def beyond(project: Any, bias: Any) -> Any:
        return project if bias is None else lambda x: project(x) + bias

    parts = (beyond(*both) for both in zip(modules[:3], beside, strict=True))
    return Projections._make([*parts, modules.o])


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
