"""Each kernel alone: what it computes, in plain PyTorch too, its bytes and its FLOPs.

They are those of a pre-norm sublayer without biases, as the whole sublayer calls them.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from variator_kernels import PluginWeights, extension, functional

from .. import internals
from ..harness.checks import Outputs, Truth, truth
from . import Arm, Call, Case, Key, Work, dense, models
from .sublayer import Sublayer

NAMES = (
    "group_merge", "adapter_decompress", "group_merge_backward", "adapter_decompress_backward",
    "compressed_ffn", "compressed_ffn_backward", "product in", "product out",
)  # fmt: skip


OF = {"cpu": NAMES[:6], "triton": NAMES[:4], "cuda": (*NAMES[:4], *NAMES[6:])}
"""Those of each backend."""


class Kernel(NamedTuple):
    """By backend, and in plain PyTorch of any dtype."""

    call: Callable[[str], Outputs]
    plain: Callable[[torch.dtype], Outputs]
    work: Work


def cases(layer: Sublayer, k: int, arms: Mapping[str, str], names: Iterable[str]) -> list[Case]:
    """A case a kernel. ``arms``: names, and the backend or instruction set of each."""
    with torch.no_grad():
        made = kernels(layer, k)
    found = []
    for name in (name for name in NAMES if name in names):
        kernel, dtype = made[name], models.DTYPES[layer.dtype]

        def measure(key: Key, kernel: Kernel = kernel, dtype: torch.dtype = dtype) -> Truth:
            return truth(kernel.plain(torch.float64), kernel.plain(dtype))

        sizes = (layer.dtype, layer.batch, layer.length)
        case = Case(name, "kernel", "forward", layer.model.name, *sizes, measure)
        for arm, backend in arms.items():
            isa = backend not in ("triton", "cuda")
            if name in OF["cpu" if isa else backend]:
                build = partial(_call, kernel, backend, isa)
                tokens = layer.batch * layer.length
                case.arms.append(Arm(Key(arm, k), build, tokens, work=(kernel.work,)))
        found.append(case)
    return found


def _call(kernel: Kernel, backend: str, isa: bool) -> Call:
    return partial(_on_isa, backend, kernel) if isa else partial(kernel.call, backend)


def _on_isa(isa: str, kernel: Kernel) -> Outputs:
    cpu: Any = extension.load()
    before = cpu.active_isa()
    cpu.set_isa(isa)
    try:
        return kernel.call("cpu")
    finally:
        cpu.set_isa(before)


def kernels(layer: Sublayer, k: int) -> dict[str, Kernel]:
    """Every kernel by name; call it without gradients, as those of the backward pass are called."""
    x, ffn, p = layer.x, layer.ffn, layer.plugin(k)
    tokens, d, f, r = layer.batch * layer.length, layer.d, layer.f, layer.bottleneck

    def merge_plain(x: Tensor, p: PluginWeights, norm_weight: Tensor | None) -> Outputs:
        h = dense.library_norm(ffn._replace(norm_weight=norm_weight), x)
        weights = (p.merge_weight, p.merge_bias)
        merged = functional.group_merge(h, *weights, backend="reference")
        return merged, F.linear(h, p.w1.chunk(2, -1)[1])

    def decompress_plain(u: Tensor, projected: Tensor, p: PluginWeights) -> Tensor:
        u = u.repeat_interleave(k, 1)[:, : x.shape[1]]
        t = torch.tanh(F.linear(u, p.w1.chunk(2, -1)[0], p.b1) + projected.to(u.dtype))
        return u + F.linear(t, p.w2, p.b2)

    g, projected = merge_plain(x, p, ffn.norm_weight)
    projected, groups = projected.float(), g.shape[0] * g.shape[1]
    flat = g.view(groups, d)
    inner = dense.INNER[ffn.activation](F.linear(flat, ffn.w_in))
    d_merged, d_projected = torch.randn_like(g), torch.randn_like(projected)
    weights = functools.cache(lambda backend: internals.group_merge(x, p, ffn, backend)[2])

    def merge_gradients_plain(dtype: torch.dtype) -> Outputs:
        given: Any = (x, p.merge_weight, p.merge_bias, p.w1, ffn.norm_weight)
        leaves: Any = [t.detach().to(dtype).requires_grad_() for t in given]
        q = models.moved(p, dtype)._replace(
            merge_weight=leaves[1], merge_bias=leaves[2], w1=leaves[3]
        )
        seeds = (d_merged.to(dtype), d_projected.to(dtype))
        with torch.enable_grad():
            out = merge_plain(leaves[0], q, leaves[4])
            dx, dw, db, dw1, dn = torch.autograd.grad(out, leaves, seeds)
        return dx, dw, db, dw1.chunk(2, -1)[1], dn

    def decompress_gradients_plain(dtype: torch.dtype) -> Outputs:
        given = (g, projected, p.w1, p.b1, p.w2, p.b2)
        leaves: Any = [t.detach().to(dtype).requires_grad_() for t in given]
        names = ("w1", "b1", "w2", "b2")
        q = models.moved(p, dtype)._replace(**dict(zip(names, leaves[2:], strict=True)))
        with torch.enable_grad():
            out = decompress_plain(leaves[0], leaves[1], q)
            du, dh, dw1, *others = torch.autograd.grad(out, leaves, x.to(dtype))
        return du, dh, dw1.chunk(2, -1)[0], *others

    def sublayer(backend: str, dtype: torch.dtype, grad: bool = False) -> tuple[Tensor, Any]:
        leaves: Any = [t.detach().to(dtype).requires_grad_(grad) for t in (x, *p[:6])]
        plugin = PluginWeights._make([*leaves[1:], p.activation])
        with torch.set_grad_enabled(grad):
            frozen = models.moved(ffn, dtype)
            y = functional.compressed_ffn(leaves[0], plugin, frozen, backend=backend)
        return y, leaves

    @functools.cache
    def graph(backend: str) -> tuple[Tensor, Any]:
        return sublayer(backend, x.dtype, grad=True)

    def gradients(y: Tensor, leaves: Any) -> Outputs:
        return torch.autograd.grad(y, leaves, x.to(y.dtype), retain_graph=True)

    def wide(dtype: torch.dtype) -> tuple[Tensor, PluginWeights]:
        return x.to(dtype), models.moved(p, dtype)

    def linear(a: Tensor, weight: Tensor, activation: str, dtype: torch.dtype) -> Outputs:
        out = F.linear(a.to(dtype), weight.to(dtype))
        return (out if activation == "none" else dense.INNER[activation](out),)

    # Of the plugin's kernels: x, W_1h h and a vector a group, once each; backward kernels, with the
    # sums for the weights' gradients, write as much again. Of a product: its three matrices.
    item = x.element_size()
    plugin_bytes = tokens * (d * item + r * 4) + groups * d * item
    product = Work(item * (d * f + groups * (d + f)), 2 * groups * d * f)
    macs = layer.macs([layer.length] * layer.batch, k)
    norm_weight: Any = ffn.norm_weight
    made = (
        Kernel(lambda b: internals.group_merge(x, p, ffn, b)[:2],
               lambda t: merge_plain(*wide(t), norm_weight.to(t)),
               Work(plugin_bytes, 2 * tokens * d * (k + 1 + r))),
        Kernel(lambda b: (internals.adapter_decompress(g, projected, p, x, b),),
               lambda t: (x.to(t) + decompress_plain(g.to(t), projected, wide(t)[1]),),
               Work(plugin_bytes + tokens * d * item, 2 * (tokens + groups) * d * r)),
        Kernel(lambda b: internals.group_merge_backward(
                   (d_merged, d_projected), x, weights(b), p, ffn, b),
               merge_gradients_plain,
               Work(plugin_bytes + tokens * d * item, 4 * tokens * d * (k + 1 + r))),
        Kernel(lambda b: internals.adapter_decompress_backward(x, g, projected, p, b),
               decompress_gradients_plain,
               Work(plugin_bytes + tokens * r * 4 + groups * d * item,
                    2 * (2 * tokens + 3 * groups) * d * r)),
        Kernel(lambda b: (sublayer(b, x.dtype)[0],),
               lambda t: (sublayer("reference", t)[0],),
               Work(3 * x.numel() * item, 2 * macs)),
        Kernel(lambda b: gradients(*graph(b)),
               lambda t: gradients(*sublayer("reference", t, grad=True)),
               Work(3 * x.numel() * item, 2 * macs)),
        Kernel(lambda b: (internals.cuda_product(flat, ffn.w_in, None, ffn.activation),),
               lambda t: linear(flat, ffn.w_in, ffn.activation, t), product),
        Kernel(lambda b: (internals.cuda_product(inner, ffn.w_out, None, "none"),),
               lambda t: linear(inner, ffn.w_out, "none", t), product),
    )  # fmt: skip
    return dict(zip(NAMES, made, strict=True))
