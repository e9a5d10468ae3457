"""What a model costs: multiply-adds and parameters, by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from . import checks
from .ops.flop_formulas import decompress_macs, ffn_macs, merge_macs
from .runtime.level import mentioned, resolve
from .runtime.state import STATE
from .sites.feed_forward import describe
from .sites.find import find
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
) -> Count:
    """Multiply-adds and parameters of a model's encoder, patched or not, on any device.

    Args:
        model: of a known family.
        batch, length: rows and tokens a row; or ``length`` gives every row its own number, and
            ``batch`` is not looked at. FFN, merge and decompress then follow the real tokens,
            attention the padded ones.
        ratio: k, or a mapping, as :func:`set_ratio` takes it; 1 is dense. Of a model that is not
            patched it may be any.
        bottleneck: r; by default the patched model's, else 64.

    Raises:
        ValueError: an argument is out of range, or the family is not known.
    """
    found = find(model)
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

    config, layers = found.encoder.config, len(found.layers)
    d, f = config.hidden_size, getattr(config, found.family.inner_size)
    heads = config.num_attention_heads
    inner = heads * getattr(config, "d_kv", d // heads)
    gated = describe(found.layers[0]).w_gate is not None or getattr(config, "is_gated_act", False)
    rows, longest = len(lengths), max(lengths, default=0)
    unchanged = {
        "attention_projections": layers * rows * longest * 4 * d * inner,
        "attention_core": layers * rows * 2 * longest**2 * inner,
        "other": _outside_blocks(found.encoder, rows, longest),
    }
    tokens = sum(lengths)
    dense = Parts(**unchanged, ffn=layers * tokens * ffn_macs(d, f, gated))
    vectors = {k: sum(-(-n // k) for n in lengths) for k in {1, *ratios}}  # that the FFN runs on
    used = Parts(
        **unchanged,
        ffn=sum(vectors[k] for k in ratios) * ffn_macs(d, f, gated),
        merge=sum(merge_macs(tokens, d, k) for k in compressed),
        decompress=sum(decompress_macs(tokens, vectors[k], d, r) for k in compressed),
    )

    own = [i for i, _ in found.own_layers]  # a shared module runs often and is there once
    weights = ffn_macs(d, f, gated) * len(own)
    plugins = {id(p) for m in attached(found.encoder) for p in m.parameters()} if state else ()
    base = sum(p.numel() for p in found.encoder.parameters() if id(p) not in plugins)
    projections = len(set(map(id, found.blocks))) * 4 * d * inner
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


def _outside_blocks(encoder: nn.Module, rows: int, length: int) -> int:
    """ELECTRA's projection of its embeddings, a token, and BERT's pooler, a row."""
    projection: Any = getattr(encoder, "embeddings_project", None)
    pooler: Any = getattr(encoder, "pooler", None)
    macs = 0 if projection is None else rows * length * projection.weight.numel()
    return macs + (0 if pooler is None else rows * pooler.dense.weight.numel())


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
