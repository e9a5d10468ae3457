"""What a model costs: multiply-adds and parameters, by part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import checks
from .ops.flop_formulas import decompress_macs, ffn_macs, groups_around, merge_macs
from .runtime.level import mentioned, resolve
from .runtime.state import STATE
from .sites.family import follow, lookup
from .sites.find import Found, find
from .sites.install import attached, sites_of


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

    Quantised linear layers count as what they stand for. LoRA (peft's) counts with the layers that
    it is beside: its parameters always, its products where they run (active and not merged).

    Args:
        model: of a known family.
        batch, length: rows and tokens a row; or ``length`` gives every row its own number, and
            ``batch`` is not looked at. FFN, merge and decompress then follow the real tokens,
            attention the padded ones.
        ratio: k, or a mapping, as :func:`set_ratio` takes it; 1 is dense. Of a model that is not
            patched it may be any.
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
    if found.family.uncounted:
        raise ValueError(
            f"model must be of a family that flops.count knows whole, {found.family.name} has "
            f"{found.family.uncounted}"
        )
    sites = sites_of(found)
    available = tuple(map(checks.ratio, mentioned(ratio)))
    ratios = resolve(ratio, sites, available, found.owners).ratios
    compressed = [k for k in ratios if k > 1]
    if isinstance(length, int):
        lengths = [checks.ratio(length, "length", least=0)] * checks.ratio(batch, "batch", least=0)
    else:
        lengths = [checks.ratio(n, "length", least=0) for n in length]
    state = vars(found.encoder).get(STATE)
    if bottleneck is None:
        bottleneck = 64 if state is None else state.method.config.bottleneck
    r = checks.ratio(bottleneck, "bottleneck")

    config, layers = getattr(found.encoder, "config", None), len(found.layers)
    d, f = found.hidden_size, _of(config, found.family.inner_size)
    heads = _of(config, "num_attention_heads")
    size = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or d // heads
    inner = heads * size
    both = inner + (getattr(config, "num_key_value_heads", None) or heads) * size
    gated = (
        bool(found.family.fused)
        or lookup(found.layers[0], found.family.w_gate) is not None
        or getattr(config, "is_gated_act", False)
    )
    rows, longest = len(lengths), max(lengths, default=0)
    low_rank = [_low_rank_parts(found, i) for i in range(layers)]
    beside_attention = sum(attention.macs for attention, _ in low_rank)
    beside_ffns = [ffn.macs for _, ffn in low_rank]
    unchanged = {
        "attention_projections": rows * longest * (layers * 2 * d * both + beside_attention),
        "attention_core": layers * rows * 2 * longest**2 * inner,
        "other": _outside_blocks(found.encoder, rows, longest),
    }
    first = state.kept.first if state else found.family.keep_first
    last = state.kept.last if state else 0
    first = first if keep_first is None else checks.integer(keep_first, "keep_first")
    last = last if keep_last is None else checks.integer(keep_last, "keep_last")
    whole = _whole(lengths, first, last, kept)
    wholes = sum(map(len, whole))
    tokens = sum(lengths)
    ffns = [ffn_macs(d, f, gated) + macs for macs in beside_ffns]
    dense = Parts(**unchanged, ffn=tokens * sum(ffns))
    merged = tokens - wholes
    groups = {k: sum(map(groups_around, lengths, repeat(k), whole)) for k in compressed}
    vectors = {1: tokens, **{k: number + wholes for k, number in groups.items()}}  # in the FFN
    used = Parts(
        **unchanged,
        ffn=sum(vectors[k] * macs for k, macs in zip(ratios, ffns, strict=True)),
        merge=sum(merge_macs(merged, d, k) for k in compressed),
        decompress=sum(decompress_macs(merged, groups[k], d, r) for k in compressed),
    )

    own = [i for i, _ in found.own_layers]  # a shared module runs often and is there once
    weights = sum(ffn_macs(d, f, gated) + low_rank[i][1].parameters for i in own)
    plugins = {id(m) for top in attached(found.encoder) for m in top.modules()} if state else ()
    base = _parameters(m for m in found.encoder.modules() if id(m) not in plugins)
    blocks = {id(block): i for i, block in enumerate(found.blocks)}.values()
    projections = sum(2 * d * both + low_rank[i][0].parameters for i in blocks)
    plain = {"attention_projections": projections, "ffn": weights}
    rest = base - projections - weights
    dense_parameters = Parts(**plain, other=rest)
    sizes = [plugin_parameters(d, ratios[i], r) for i in own if ratios[i] > 1]
    parameters = Parts(
        **plain,
        merge=sum(merge for merge, _ in sizes),
        decompress=sum(decompress for _, decompress in sizes),
        other=rest,
    )
    return Count(used, dense, parameters, dense_parameters)


def _whole(lengths: list[int], first: int, last: int, kept: Tensor | None) -> list[set[int]]:
    """Of each row the positions of the tokens that stay whole."""
    whole = [{*range(min(first, n)), *range(max(n - last, 0), n)} for n in lengths]
    if kept is None:
        return whole
    shape = (len(lengths), max(lengths, default=0))
    if not isinstance(kept, Tensor) or tuple(kept.shape) != shape:
        got = list(kept.shape) if isinstance(kept, Tensor) else type(kept).__name__
        raise ValueError(f"kept must be a tensor of shape {list(shape)}, got {got}")
    further = [row.nonzero().flatten().tolist() for row in kept]
    return [
        ends | {at for at in places if at < n}
        for ends, places, n in zip(whole, further, lengths, strict=True)
    ]


def _of(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if value is None:
        raise ValueError(f"model's encoder must have config.{name} for flops.count, it has none")
    return value


def _outside_blocks(encoder: nn.Module, rows: int, length: int) -> int:
    """Projections of embeddings (ELECTRA's, ALBERT's), a token, and poolers (BERT's), a row."""
    found: list[tuple[int, Any]] = [(rows * length, lookup(encoder, path)) for path in _PROJECTIONS]
    found += [(rows, lookup(encoder, path)) for path in ("pooler.dense", "pooler")]
    return sum(
        vectors * (linear.in_features * linear.out_features + _low_rank([linear]).macs)
        for vectors, linear in found
        if hasattr(linear, "in_features")
    )


_PROJECTIONS = ("embeddings_project", "encoder.embedding_hidden_mapping_in")


def _parameters(modules: Iterable[nn.Module]) -> int:
    """Elements of all weights, each once; of a quantised linear layer those that it stands for."""
    sizes: dict[int, int] = {}
    for module in modules:
        sizes |= {id(p): p.numel() for p in module.parameters(recurse=False)}
        linear: Any = module
        weight = getattr(linear, "weight", None)
        if not (hasattr(linear, "in_features") and hasattr(linear, "out_features")):
            continue
        size = linear.in_features * linear.out_features
        if id(weight) in sizes:  # which may hold several values an element
            sizes[id(weight)] = size
        elif callable(weight):  # quantize_dynamic's: weight and bias are packed
            bias = linear.bias()
            sizes[id(linear)] = size + (0 if bias is None else bias.numel())
    return sum(sizes.values())


class _Beside(NamedTuple):
    """What LoRA adds to linear layers: multiply-adds a vector, and parameters."""

    macs: int
    parameters: int


def _low_rank_parts(found: Found, position: int) -> tuple[_Beside, _Beside]:
    """Beside the attention of one block, and beside its FFN."""
    layer = found.layers[position]
    steps = found.family.steps or ("",)
    ffn = {id(m): m for step in steps for m in follow(layer, step).modules()}
    rest = [m for m in found.blocks[position].modules() if id(m) not in ffn]
    return _low_rank(rest), _low_rank(ffn.values())


def _low_rank(modules: Iterable[nn.Module]) -> _Beside:
    """Of the layers among ``modules`` that peft made: what runs now, and what is there."""
    macs = parameters = 0
    for module in modules:
        layer: Any = module
        first, second = (getattr(layer, f"lora_{name}", {}) for name in "AB")
        sizes = {
            name: first[name].weight.numel() + second[name].weight.numel()
            for name in first
            if name in second
        }
        if sizes:
            parameters += sum(sizes.values())
            runs = () if layer.merged or layer.disable_adapters else layer.active_adapters
            macs += sum(sizes.get(name, 0) for name in runs)
    return _Beside(macs, parameters)


def plugin_parameters(hidden: int, ratio: int, bottleneck: int) -> tuple[int, int]:
    """Parameters of one plugin: merge, decompress."""
    return ratio * ratio * hidden + ratio, 3 * bottleneck * hidden + bottleneck + hidden


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
