"""Dense sublayers of a model that was patched with ``optimize="encoder"``, in few passes.

Whatever keeps a sublayer from being no more than its weights (hooks, replaced parts, gradients, a
compiler or a mode that looks on, a mask that is not of tokens) makes it run as it was.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops import dense, int8_linear, self_attention
from ..runtime.context import Context
from .attention import DescribedAttention
from .described import Described
from .reach import reach_of


def feed_forward(
    layer: Any, described: Described[Any], x: Tensor, context: Context
) -> Tensor | None:
    """The FFN sublayer ``layer`` of ``x [B, n, d]``; None: as it was."""
    if not context.fuses:
        return None
    ffn = _described(described, layer)
    if ffn is None:
        return None
    return dense.feed_forward(x, ffn._replace(precision=_precision(layer)))


def attention(
    layer: Any,
    described: DescribedAttention,
    x: Tensor,
    context: Context,
    rotation: self_attention.Rotation | None,
) -> Tensor | None:
    """The self-attention sublayer ``layer`` of ``x [B, n, d]``; None: as it was."""
    if not context.fuses or x.dim() != 3:
        return None
    found = _described(described, layer)
    reach = reach_of(layer)
    if found is None or found.of_distances is not None or reach.paths.places:
        return None
    if found.global_keys is not None:
        return None
    table = reach.table
    if not self_attention.fuses(x, found, None if table is None else table.weight):
        return None

    def keys() -> self_attention.Keys:
        terms = reach.terms(x, found, {}, table)
        return self_attention.plain_keys(x, context.mask_of(x), terms)

    key = "plain keys", x.dtype, table, found.window
    made = context.once(key, x, keys)
    return self_attention.dense(x, found._replace(precision=_precision(layer)), made, rotation)


def _precision(layer: Any) -> str | None:
    return int8_linear.here(layer.variator_state.method.config.precision, layer.training)


def _described(described: Described[Any], layer: Any) -> Any:
    """What it consists of; None where something stands in the way, which the plain forward minds
    not: a part that somebody hooked or replaced, weights that accelerate brings in."""
    try:
        return described.of(layer)
    except (TypeError, ValueError):
        return None
