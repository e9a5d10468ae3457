"""What kernels that read addresses ask of grouped_attention's arguments."""

from __future__ import annotations

import torch

from ..arguments import require
from .op import Attention
from .reference import Visible
from .relative import DistanceBias


def check(call: Attention) -> None:
    """Shapes, dtypes and devices fit; patterns too where they lie on the CPU.

    Raises:
        ValueError: something does not.
    """
    queries, keys, values, visible, relative, _ = call
    require(queries.dim() == keys.dim() == 4, "queries and keys are [rows, ., heads, d]")
    rows, n, heads, d = queries.shape
    count, kv_heads = keys.shape[1:3]
    for tensor, name in ((keys, "keys"), (values, "values")):
        if tensor.shape != (rows, count, kv_heads, d):
            require(False, f"{name} are {list(tensor.shape)}")
    if kv_heads < 1 or heads % kv_heads:
        require(False, f"{kv_heads} heads of keys for {heads}")
    require(queries.dtype == keys.dtype == values.dtype, "queries, keys and values are of a dtype")
    device = queries.device
    require(keys.device == device == values.device, "everything is on the queries' device")
    check_keys(visible, relative, (rows, n, count, heads), device)


def check_keys(
    visible: Visible,
    relative: DistanceBias | None,
    sizes: tuple[int, int, int, int],
    device: torch.device,
) -> None:
    """Of what holds of keys, for rows, queries, keys and heads."""
    rows, n, count, heads = sizes
    for given in visible:
        if given is not None:
            require(given.shape == (rows, count), "bias, first, last are [rows, keys]")
            require(given.device == device, "everything is on the queries' device")
    if relative is None:
        return
    shape = relative.values.shape
    fits = len(shape) == 3 and shape[0] > 0 and shape[1] in (1, heads) and shape[2] > 0
    require(fits, f"values of distances are {list(shape)}")
    require(relative.queries.shape == (rows, n), "query positions are [rows, queries]")
    require(relative.keys.shape == (rows, count), "key positions are [rows, keys]")
    pattern = relative.pattern
    on_device = all(t is None or t.device == device for t in relative[:4])
    require(on_device, "everything is on the queries' device")
    if pattern is not None:
        require(pattern.shape == (rows, count), "patterns are [rows, keys]")
        if pattern.numel() and pattern.is_cpu:
            low, high = (int(edge) for edge in pattern.aminmax())
            require(low >= 0 and high < shape[0], f"patterns are {low} to {high} of {shape[0]}")
