"""What a model costs: multiply-adds and parameters, by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import checks
from .flops_attention import Core, core, unknown
from .flops_lora import LowRank, low_rank_parts
from .flops_modules import outside_blocks, parameters
from .flops_rows import Prompts, Rows, whole
from .ops.flop_formulas import decompress_macs, ffn_macs, merge_macs
from .runtime.kept import WINDOW
from .runtime.level import by_placement, mentioned, resolve
from .runtime.site import Site
from .runtime.state import STATE
from .sites.family import lookup
from .sites.find import find
from .sites.found import Found
from .sites.in_place import check_in_place
from .sites.install import attached, owners_of, sites_of


@dataclass(frozen=True)
class Parts:
    """One number for each part of an encoder."""

    attention_projections: int = 0
    attention_core: int = 0
    ffn: int = 0
    merge: int = 0
    decompress: int = 0
    other: int = 0
    """Embeddings, norms, biases, pooler; of these only matrix products count as multiply-adds."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Count:
    """Of one encoder at one level; ``dense`` is the same without plugins."""

    multiply_adds: Parts
    dense_multiply_adds: Parts
    parameters: Parts
    dense_parameters: Parts

    @property
    def fraction_left(self) -> float:
        """Multiply-adds over those of the dense encoder."""
        return self.multiply_adds.total / max(self.dense_multiply_adds.total, 1)


def count(
    model: nn.Module,
    batch: int = 1,
    length: int | Sequence[int] = 512,
    ratio: Any = 4,
    bottleneck: int | None = None,
    *,
    keep_first: int | None = None,
    keep_last: int | None = None,
    kept: Tensor | None = None,
) -> Count:
    """Multiply-adds and parameters of a model's encoder, patched or not, on any device.

    Of a decoder they are those of a prompt: a query counts the keys that it sees.

    Quantised linear layers count as what they stand for. LoRA (peft's) counts with the layers that
    it is beside: its parameters always, its products where they run (active and not merged).

    Args:
        model: of a known family.
        batch, length: rows and tokens a row; or ``length`` gives every row its own number, and
            ``batch`` is not looked at. FFN, merge and decompress then follow the real tokens,
            attention the padded ones.
        ratio: k, a mapping or a :class:`Plan`, as :func:`set_ratio` takes it; 1 is dense. Of a
            model that is not patched it may be any, and mapping or plan say at which placements.
        bottleneck: r; by default the patched model's, else 64.
        keep_first, keep_last: tokens at the ends of a row that stay whole; by default the patched
            model's, else what :func:`patch` would take. They cost what they cost in the dense FFN,
            and no merge and adapter.
        kept: ``[batch, length]``, nonzero for further tokens that stay whole, rows beginning in
            column 0. Those of a model's own ids (``keep``) are not known here: say where they are.

    Raises:
        ValueError: an argument is out of range, or the family is not known.
    """
    found = find(model)
    if why := unknown(found):
        raise ValueError(
            f"model must be of a family that flops.count knows whole, {found.family.name} has {why}"
        )
    state = vars(found.encoder).get(STATE)
    if state is None:
        named = by_placement(ratio)
        places = ("ffn",) if named is None else tuple(named)
        sites = sites_of(found, places)
    else:
        check_in_place(found, state)
        sites = state.sites
    every = tuple(map(checks.ratio, mentioned(ratio)))
    available = {site.placement: every for site in sites}
    ratios = resolve(ratio, sites, available, owners_of(found, sites)).ratios
    if isinstance(length, int):
        lengths = [checks.ratio(length, "length", least=0)] * checks.ratio(batch, "batch", least=0)
    else:
        lengths = [checks.ratio(n, "length", least=0) for n in length]
    if bottleneck is None:
        bottleneck = 64 if state is None else state.method.config.bottleneck
    r = checks.ratio(bottleneck, "bottleneck")

    shape = _shape(found)
    first = state.kept.first if state else found.family.keep_first
    last = state.kept.last if state else 0
    first = first if keep_first is None else checks.integer(keep_first, "keep_first")
    last = last if keep_last is None else checks.integer(keep_last, "keep_last")
    whole_at = whole(lengths, first, last, kept)
    rows = Rows(lengths, whole_at)
    if found.family.decoder:
        rows = Prompts(lengths, whole_at, first, state.kept.window if state else WINDOW)
    beside = [low_rank_parts(found, i) for i in range(len(found.layers))]
    cores = [core(found, i, shape.queries) for i in range(len(found.layers))]
    outside = outside_blocks(found.encoder, len(lengths), rows.longest)
    level = dict(zip(sites, ratios, strict=True))
    used = _multiply_adds(shape, rows, beside, cores, level, r, outside)
    dense = _multiply_adds(shape, rows, beside, cores, {}, r, outside)
    dense_parameters = _dense_parameters(found, shape, beside, cores, state is not None)
    own = [sites[i] for i, owner in enumerate(owners_of(found, sites)) if i == owner]
    sizes = [plugin_parameters(shape.d, level[s], r, s.placement) for s in own if level[s] > 1]
    with_plugins = replace(
        dense_parameters,
        merge=sum(merge for merge, _ in sizes),
        decompress=sum(decompress for _, decompress in sizes),
    )
    return Count(used, dense, with_plugins, dense_parameters)


class _Shape(NamedTuple):
    """Of one block: hidden size, FFN inner size, all query heads together, all key heads."""

    d: int
    f: int
    gated: bool
    queries: int
    keys: int


def _shape(found: Found) -> _Shape:
    config = getattr(found.encoder, "config", None)
    d, heads = found.hidden_size, _of(config, "num_attention_heads")
    size = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or d // heads
    gated = (
        bool(found.family.fused)
        or lookup(found.layers[0], found.family.w_gate) is not None
        or getattr(config, "is_gated_act", False)
    )
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = _of(config, found.family.inner_size)
    return _Shape(d, inner, gated, heads * size, key_heads * size)


def _multiply_adds(
    shape: _Shape,
    rows: Rows,
    beside: list[LowRank],
    cores: list[Core],
    level: Mapping[Site, int],
    r: int,
    outside: int,
) -> Parts:
    projections = attention = ffn = merge = decompress = 0
    batch, n = len(rows.lengths), rows.longest
    for i, extra in enumerate(beside):
        k = level.get(Site("ffn", i), 1)
        cost = ffn_macs(shape.d, shape.f, shape.gated) + extra.ffn.macs
        ffn += sum(rows.vectors(k)) * cost
        around, front = (level.get(Site(f"attention{end}", i), 1) for end in ("", "_kv"))
        # Attention runs on padding too: on as many vectors as the longest row has.
        keys, pairs = rows.attention(around, front)
        queries = keys if around > 1 else n
        of_keys = 2 * shape.d * shape.keys + extra.keys.macs
        of_queries = 2 * shape.d * shape.queries + extra.attention.macs
        of_queries -= extra.keys.macs + extra.distances.macs
        further = cores[i].global_keys(n)
        row, shared = cores[i].cost(queries, keys, pairs, further, around == front == 1)
        of_row = queries * of_queries + (keys + further) * of_keys
        projections += batch * of_row + (shared if batch else 0)
        attention += batch * row
        for x in (k, around):
            if x > 1:
                merge += merge_macs(rows.merged(x), shape.d, x)
                decompress += decompress_macs(rows.merged(x), sum(rows.groups(x)), shape.d, r)
        if front > 1:
            merge += merge_macs(rows.merged_keys(front), shape.d, front)
    return Parts(projections, attention, ffn, merge, decompress, outside)


def _dense_parameters(
    found: Found, shape: _Shape, beside: list[LowRank], cores: list[Core], patched: bool
) -> Parts:
    own = [i for i, _ in found.own_layers]  # a shared module runs often and is there once
    size = ffn_macs(shape.d, shape.f, shape.gated)
    weights = sum(size + beside[i].ffn.parameters for i in own)
    plugins = {id(m) for top in attached(found.encoder) for m in top.modules()} if patched else ()
    base = parameters(m for m in found.encoder.modules() if id(m) not in plugins)
    blocks = {id(block): i for i, block in enumerate(found.blocks)}.values()
    each = 2 * shape.d * (shape.queries + shape.keys)
    further = (beside[i].attention.parameters + cores[i].parameters for i in blocks)
    projections = len(blocks) * each + sum(further)
    return Parts(projections, ffn=weights, other=base - projections - weights)


def _of(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if value is None:
        raise ValueError(f"model's encoder must have config.{name} for flops.count, it has none")
    return value


def plugin_parameters(
    hidden: int, ratio: int, bottleneck: int, placement: str = "ffn"
) -> tuple[int, int]:
    """Parameters of one plugin: merge, decompress."""
    merge = ratio * ratio * hidden + ratio
    if placement == "attention_kv":
        return merge, 0
    return merge, 3 * bottleneck * hidden + bottleneck + hidden


def paper_check(
    ratio: int = 4, bottleneck: int = 64, hidden: int = 768, inner: int = 3072
) -> tuple[float, float]:
    """The paper's section 3.4: the fraction of one FFN's multiply-adds that a plugin saves, and
    the parameters it adds, over the FFN's.

    The paper says 71.7 % and 3.4 % for the default arguments. Its adapter is not split (3·r·d a
    token); this gives 71.8 %, since it does not say how it counts and rounds the small terms.
    """
    ffn = ffn_macs(hidden, inner, gated=False)
    adapter = 3 * bottleneck * hidden
    saved = 1 - (1 / ratio + (merge_macs(1, hidden, ratio) + adapter) / ffn)
    return saved, sum(plugin_parameters(hidden, ratio, bottleneck)) / ffn
