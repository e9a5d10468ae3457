"""What kernels that read addresses ask of grouped_attention's arguments."""

from __future__ import annotations

from ..arguments import require
from .op import Attention


def check(call: Attention) -> None:
    """Shapes, dtypes and devices fit; patterns too where they lie on the CPU.

    Raises:
        ValueError: something does not.
    """
    queries, keys, values, visible, relative, _ = call
    require(queries.dim() == keys.dim() == 4, "queries and keys are [rows, ., heads, d]")
    rows, n, heads, d = queries.shape
    count, kv_heads = keys.shape[1:3]
    require(keys.shape == (rows, count, kv_heads, d), f"keys are {list(keys.shape)}")
    require(values.shape == keys.shape, f"values are {list(values.shape)}")
    require(kv_heads > 0 and heads % kv_heads == 0, f"{kv_heads} heads of keys for {heads}")
    require(queries.dtype == keys.dtype == values.dtype, "queries, keys and values are of a dtype")
    device = queries.device
    require(all(t.device == device for t in call[:3]), f"everything is on {device}")
    for bound in visible:
        require(bound is None or bound.shape == (rows, count), "bias, first, last are [rows, keys]")
        require(bound is None or bound.device == device, f"everything is on {device}")
    if relative is None:
        return
    shape = relative.values.shape
    fits = len(shape) == 3 and shape[0] > 0 and shape[1] in (1, heads) and shape[2] > 0
    require(fits, f"values of distances are {list(shape)}")
    require(relative.queries.shape == (rows, n), "query positions are [rows, queries]")
    require(relative.keys.shape == (rows, count), "key positions are [rows, keys]")
    pattern = relative.pattern
    on_device = all(t is None or t.device == device for t in relative[:4])
    require(on_device, f"everything is on {device}")
    if pattern is not None:
        require(pattern.shape == (rows, count), "patterns are [rows, keys]")
        if pattern.numel() and pattern.is_cpu:
            low, high = (int(edge) for edge in pattern.aminmax())
            require(low >= 0 and high < shape[0], f"patterns are {low} to {high} of {shape[0]}")
