"""Inputs of grouped_attention that its tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.ops.cases import masked, moved
from tests.ops.remember import remembered
from variator_kernels import functional as vf
from variator_kernels.ops.groups import Keep, slots
from variator_kernels.ops.make_groups import make_groups

# (rows, queries, keys, heads, heads of keys, head size): one query, a ragged size, no query, no
# key, no row, grouped-query attention, more keys than a tile holds, head sizes beside a vector's.
SHAPES = [
    (2, 1, 1, 2, 2, 16),
    (2, 1, 37, 4, 2, 64),
    (3, 37, 10, 3, 3, 24),
    (1, 70, 300, 2, 1, 33),
    (2, 0, 4, 2, 2, 8),
    (2, 5, 0, 2, 2, 8),
    (0, 5, 3, 2, 2, 8),
    (1, 130, 530, 1, 1, 7),
    (2, 65, 129, 6, 2, 128),
]
KINDS = ["plain", "bias", "t5 attention", "t5 attention_kv", "window", "causal"]

PATHS = ["packed", "direct"]
"""The ways of the CPU's kernel; the fixture `path` takes one, whatever the sizes."""


def qkv(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rows, n, count, heads, kv_heads, d = shape
    sizes = (rows, n, heads, d), (rows, count, kv_heads, d), (rows, count, kv_heads, d)
    return [torch.randn(*size).to(dtype) for size in sizes]


def t5_table(heads: int, buckets: int = 32) -> Tensor:
    return 2 * torch.randn(buckets, heads)


def options(kind: str, shape: tuple[int, ...], ratio: int = 4) -> dict[str, Any]:
    """Keyword arguments of a kind, for keys that stand for groups of ``ratio`` tokens."""
    rows, n, count, heads, _, _ = shape
    steps = torch.arange(count)
    if kind == "plain":
        return {}
    if kind == "bias":
        bias = torch.randint(0, ratio + 1, (rows, count)).float().log()  # some are -inf
        if rows and count:
            bias[0] = -torch.inf
        return {"bias": bias, "scale": 0.2}
    if kind == "causal":
        first = (steps + 1) * ratio
        first, last = first - ratio, first + n // 2
        return {name: t.expand(rows, count).int() for name, t in (("first", first), ("last", last))}
    spans = torch.randint(1, ratio + 1, (rows, count))
    positions = torch.arange(n).expand(rows, n)
    starts = (steps * ratio).expand(rows, count)
    table = t5_table(heads)
    if kind == "t5 attention":
        means = starts + (spans - 1) / 2
        relative = vf.distance_bias(table, queries=positions, keys=means)
        return {"relative": relative, "bias": spans.float().log(), "scale": 1.0}
    members = torch.arange(ratio) < spans[..., None]
    members[:, ::3] = True
    given: dict[str, Any] = {"members": members, "queries": positions, "keys": starts}
    if kind == "window":
        return {"relative": vf.distance_bias(None, window=(9, 6), **given)}
    return {"relative": vf.distance_bias(table, **given), "scale": 1.0}


def of_tokens(mask_kind: str, rows: int, n: int, ratio: int, keep: Keep) -> dict[str, Tensor]:
    """Of groups as a forward makes them: start and members of each, and the mask of tokens."""
    mask = masked(mask_kind, rows, n)
    groups = make_groups(torch.zeros(rows, n, 1), ratio, mask=mask, keep=keep)
    index, exists = slots(groups)
    assert groups.start is not None
    start = groups.start - torch.arange(rows)[:, None] * n
    real = torch.ones(rows, n, dtype=torch.bool) if mask is None else mask
    return {"start": start, "index": index, "members": exists, "mask": real}


def gradients(
    inputs: list[Tensor], backend: str, given: dict[str, Any], d_out: Tensor,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """Of queries, keys, values, and of a bias that is given; back on the CPU."""
    leaves = [moved(t if dtype is None else t.to(dtype), backend) for t in inputs]
    given = {name: moved(value, backend) for name, value in given.items()}
    if "bias" in given:
        bias = given["bias"].double() if dtype == torch.double else given["bias"]
        leaves.append(bias)
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    if "bias" in given:
        given["bias"] = leaves[3]
    out = vf.grouped_attention(*leaves[:3], backend=backend, **given)
    d_out = moved(d_out, backend).to(out.dtype)
    return [g.cpu() for g in torch.autograd.grad(out, leaves, d_out)]


@remembered
def expected_gradients(
    inputs: list[Tensor], given: dict[str, Any], d_out: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """In float64, and in plain PyTorch."""
    truths = gradients(inputs, "reference", given, d_out, torch.double)
    return truths, gradients(inputs, "reference", given, d_out)


@remembered
@torch.no_grad()
def expected_output(inputs: list[Tensor], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The output in float64, and of plain PyTorch."""
    wide = [t.double() for t in inputs]
    truth = vf.grouped_attention(*wide, backend="reference", **given)
    return truth, vf.grouped_attention(*inputs, backend="reference", **given)


def check_gradients(
    inputs: list[Tensor], backend: str, given: dict[str, Any], d_out: Tensor, what: str
) -> None:
    """The project's rule for each of :func:`gradients`."""
    d_out = d_out.to(inputs[0].dtype)  # what all are given
    truths, plain = expected_gradients(inputs, given, d_out)
    found = gradients(inputs, backend, given, d_out)
    for name, *each in zip("qkvb", found, plain, truths, strict=False):
        given_dtype = given["bias"].dtype if name == "b" else inputs[0].dtype
        assert each[0].dtype == given_dtype, f"d{name} of {what} is {each[0].dtype}"
        assert_gradient(*each, f"d{name} of {what}")


def assert_gradient(found: Tensor, plain: Tensor, truth: Tensor, what: str) -> None:
    """The project's rule on the root mean square error, as in test_backward.py. Of one query all
    gradients hang on the roundings of its scores: the largest error would compare luck with luck.
    The 2e-6: what is exactly 0 in plain PyTorch (of one key's bias) is the difference of two sums
    of the size of dO · V, made in two orders.
    """
    assert found.shape == truth.shape, f"{what}: shape {list(found.shape)}, not {list(truth.shape)}"
    assert not torch.isnan(found).any(), f"{what}: NaN, an element was not written"
    error, allowed = (
        ((t.double() - truth).square().sum() / max(t.numel(), 1)).sqrt() for t in (found, plain)
    )
    assert error <= 2 * allowed + 2e-6, f"{what}: error {error:.3g}, plain {allowed:.3g}"
