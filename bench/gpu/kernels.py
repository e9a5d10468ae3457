"""Each kernel alone against its own floor: the bytes it must move, or the FLOPs it must do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.checks import judge, truth
from bench.common.timing import quartiles
from variator_kernels.ops.adapter_decompress import op as decompress
from variator_kernels.ops.feed_forward import activate, normalize
from variator_kernels.ops.group_merge import op as merge
from variator_kernels.ops.group_merge import reference as merge_reference

from .clock import Clock
from .sublayers import BOTTLENECK, MODELS, Model, Sublayer

Row = dict[str, Any]
Outputs = tuple[Tensor, ...]


class Cell(NamedTuple):
    """One kernel at one size: by backend, in plain PyTorch (of any dtype), its bytes and FLOPs."""

    name: str
    call: Callable[[str], Outputs]
    plain: Callable[[torch.dtype], Outputs]
    bytes: int
    flops: int
    backends: tuple[str, ...]


def cells(layer: Sublayer, k: int, backends: tuple[str, ...]) -> list[Cell]:
    """The kernels of a pre-norm sublayer without biases; the products are CUDA's alone."""
    x, ffn, p = layer.x, layer.ffn, layer.plugin(k)
    tokens, d, f, r = layer.tokens, layer.model.d, layer.model.f, BOTTLENECK
    w1u, w1h = p.w1.chunk(2, -1)
    norm: dict[str, Any] = {"norm": ffn.norm, "norm_weight": ffn.norm_weight, "eps": ffn.eps}

    def merge_plain(dtype: torch.dtype) -> Outputs:
        h = normalize(x.to(dtype), ffn.norm, ffn.norm_weight.to(dtype), None, ffn.eps)  # type: ignore[union-attr]
        merged = merge_reference.group_merge(h, p.merge_weight, p.merge_bias)
        return merged, F.linear(h, w1h.to(dtype))

    g, projected = merge_plain(x.dtype)
    projected, groups = projected.float(), g.shape[0] * g.shape[1]

    def merged(backend: str) -> Outputs:
        return merge.group_merge(
            x, p.merge_weight, p.merge_bias, **norm, projection=w1h, backend=backend
        )[:2]

    def decompressed(backend: str) -> Outputs:
        rest = (w1u, p.b1, p.w2, p.b2, x, None, None, k, p.activation, backend)
        return (decompress.adapter_decompress(g, projected, *rest),)

    def decompress_plain(dtype: torch.dtype) -> Outputs:
        u, wide = g.to(dtype).repeat_interleave(k, 1)[:, : x.shape[1]], projected.to(dtype)
        t = torch.tanh(F.linear(u, w1u.to(dtype), p.b1.to(dtype)) + wide)
        return (x.to(dtype) + u + F.linear(t, p.w2.to(dtype), p.b2.to(dtype)),)

    inner = activate(F.linear(g, ffn.w_in), ffn.activation).view(groups, f)

    def first(_: str) -> Outputs:
        from variator_kernels.ops.compressed_ffn.cuda import linear

        return (linear(g.view(groups, d), ffn.w_in, None, ffn.activation),)

    def second(_: str) -> Outputs:
        from variator_kernels.ops.compressed_ffn.cuda import linear

        return (linear(inner, ffn.w_out, None, "none"),)

    def first_plain(dtype: torch.dtype) -> Outputs:
        out = F.linear(g.view(groups, d).to(dtype), ffn.w_in.to(dtype))
        return (activate(out, ffn.activation),)

    def second_plain(dtype: torch.dtype) -> Outputs:
        return (F.linear(inner.to(dtype), ffn.w_out.to(dtype)),)

    d_merged, d_projected = torch.randn_like(g), torch.randn_like(projected)

    @functools.cache
    def weights(backend: str) -> Tensor:
        return merge.group_merge(x, p.merge_weight, p.merge_bias, **norm, backend=backend)[2]

    def merge_gradients(backend: str) -> Outputs:
        return torch.ops.variator.group_merge_backward(
            d_merged, d_projected, x, weights(backend), p.merge_weight, None, None, ffn.norm,
            ffn.norm_weight, None, ffn.eps, w1h, backend,
        )[:5]  # fmt: skip

    def merge_gradients_plain(dtype: torch.dtype) -> Outputs:
        given = (x, p.merge_weight, p.merge_bias, w1h, ffn.norm_weight)
        leaves: Any = [t.detach().to(dtype).requires_grad_() for t in given]  # type: ignore[union-attr]
        h = normalize(leaves[0], ffn.norm, leaves[4], None, ffn.eps)
        out = (merge_reference.group_merge(h, leaves[1], leaves[2]), F.linear(h, leaves[3]))
        return torch.autograd.grad(out, leaves, (d_merged.to(dtype), d_projected.to(dtype)))

    def decompress_gradients(backend: str) -> Outputs:
        du, *others = torch.ops.variator.adapter_decompress_backward(
            x, g, projected, w1u, p.b1, p.w2, None, None, k, p.activation, backend
        )
        return du.view(g.shape), *others

    def decompress_gradients_plain(dtype: torch.dtype) -> Outputs:
        given = (g, projected, w1u, p.b1, p.w2, p.b2)
        leaves: Any = [t.detach().to(dtype).requires_grad_() for t in given]
        u = leaves[0].repeat_interleave(k, 1)[:, : x.shape[1]]
        t = torch.tanh(F.linear(u, leaves[2], leaves[3]) + leaves[1])
        return torch.autograd.grad(u + F.linear(t, leaves[4], leaves[5]), leaves, x.to(dtype))

    only_cuda = tuple(name for name in backends if name == "cuda")
    # Of the plugin's kernels: x, W_1h h and a vector a group, once each; backward kernels, with the
    # sums for the weights' gradients, write as much again. Of a product: its three matrices.
    plugin_bytes = tokens * (d * 2 + r * 4) + groups * d * 2
    product_bytes = 2 * (d * f + groups * (d + f))
    return [
        Cell("group_merge", merged, merge_plain, plugin_bytes,
             2 * tokens * d * (k + 1 + r), backends),
        Cell("adapter_decompress", decompressed, decompress_plain, plugin_bytes + tokens * d * 2,
             2 * (tokens + groups) * d * r, backends),
        Cell("group_merge_backward", merge_gradients, merge_gradients_plain,
             plugin_bytes + tokens * d * 2, 4 * tokens * d * (k + 1 + r), backends),
        Cell("adapter_decompress_backward", decompress_gradients, decompress_gradients_plain,
             plugin_bytes + tokens * r * 4 + groups * d * 2,
             2 * (2 * tokens + 3 * groups) * d * r, backends),
        Cell("product in", first, first_plain, product_bytes, 2 * groups * d * f, only_cuda),
        Cell("product out", second, second_plain, product_bytes, 2 * groups * d * f, only_cuda),
    ]  # fmt: skip


def measure_kernels(
    clock: Clock, ceilings: dict[str, float], *, backends: tuple[str, ...], rounds: int,
    model: Model | None = None, batch: int = 32, length: int = 512, k: int = 4,
) -> list[Row]:  # fmt: skip
    """A row a kernel and backend; one without a green check has no number."""
    layer = Sublayer(model or MODELS["t5-base"], batch, length, clock.device, torch.bfloat16)
    rows: list[Row] = []
    for cell in cells(layer, k, backends):
        limit = truth(cell.plain(torch.float64), cell.plain(layer.dtype))
        floor = max(cell.bytes / ceilings["copy"], cell.flops / ceilings["matrix"])
        for backend in cell.backends:
            row: Row = {"kernel": cell.name, "backend": backend, "batch": batch, "length": length,
                        "k": k, "floor": floor, "status": "failed", "reason": ""}  # fmt: skip
            rows.append(row)
            try:
                with torch.no_grad():
                    verdict = judge(cell.call(backend), limit)
                    row.update(error=verdict.error, allowed=verdict.allowed)
                    if not verdict.ok:
                        row["reason"] = f"error {verdict.error:.2e}, allowed {verdict.allowed:.2e}"
                        continue
                    replay = clock.graphed(lambda c=cell, b=backend: c.call(b))  # type: ignore[misc]
                samples = clock.interleaved({"kernel": replay}, rounds)["kernel"]
            except Exception as error:
                row["reason"] = f"{type(error).__name__}: {error}"[:500]
                continue
            row.update(status="ok", seconds=quartiles(samples), samples=samples)
            row["over_floor"] = row["seconds"]["median"] / floor
    return rows


def text(rows: list[Row]) -> str:
    """The rows in lines."""
    lines = []
    for row in rows:
        what = f"{row['kernel']:<28}{row['backend']:<8}{row['batch']:>3} x {row['length']:<5}"
        if row["status"] == "ok":
            time = f"{row['seconds']['median'] * 1e6:10.1f} us  {row['over_floor']:.2f} x floor"
        else:
            time = f"FAILED: {row['reason']}"
        lines.append(f"{what}k={row['k']:<3}{time}")
    return "\n".join(lines)
