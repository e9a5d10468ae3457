"""Every name of the package that is not public and that the benchmarks need: here, and only here.

The tools for Triton's launch table (``bench/tools``) use ``variator_kernels.triton_kernels.launch``
besides, and ``bench/quality`` the data helpers of ``variator_kernels.train``.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from variator_kernels import FeedForward, LevelTimes, Plan, PluginWeights, extension
from variator_kernels.methods.projected import is_projected
from variator_kernels.methods.projected.composition import collecting, send
from variator_kernels.methods.projected.cost import counted
from variator_kernels.methods.projected.groups import additions, parameter_groups, projections
from variator_kernels.methods.projected.sizes import Sizes
from variator_kernels.methods.variator.config import configure
from variator_kernels.ops import prepack, rows_linear
from variator_kernels.ops.adapter_decompress import op as decompress_op
from variator_kernels.ops.arguments import Norm
from variator_kernels.ops.fused_product import Product
from variator_kernels.ops.fused_product import runs as product_runs
from variator_kernels.ops.group_merge import op as merge_op
from variator_kernels.ops.grouped_attention import DistanceBias
from variator_kernels.ops.grouped_attention.op import Attention
from variator_kernels.ops.grouped_attention.reference import Visible, looked_up
from variator_kernels.ops.groups import Keep
from variator_kernels.ops.int8_linear import own_precision
from variator_kernels.ops.int8_linear import packed as int8_packed
from variator_kernels.ops.make_groups import make_groups
from variator_kernels.runtime.controller_policy import Batch as RunningBatch
from variator_kernels.runtime.controller_policy import Policy as ControllerPolicy
from variator_kernels.runtime.controller_policy import Settings as ControllerSettings
from variator_kernels.runtime.controller_queue import Ticket
from variator_kernels.runtime.state import states
from variator_kernels.sites.families import FAMILIES
from variator_kernels.sites.family import lookup
from variator_kernels.sites.feed_forward import describe, family_of
from variator_kernels.sites.find import find
from variator_kernels.sites.layout import layout_of
from variator_kernels.sites.merged_cache import MergedLayer

__all__ = [
    "ControllerPolicy", "ControllerSettings", "DistanceBias", "LevelTimes", "Product",
    "RunningBatch", "Sizes", "Ticket", "additions", "collecting", "counted", "describe",
    "is_projected", "looked_up", "own_precision", "parameter_groups", "product_runs", "projections",
    "send",
]  # fmt: skip


def product(arm: str, weight: nn.Parameter, rows: int) -> Callable[[Tensor], Tensor] | None:
    """Of vectors with ``weight``, packed: ``"ours"``, ours in ``"int8"``, or ``"onednn"``."""
    made: Any
    if arm == "int8":
        made = int8_packed.packed(weight, None)
    elif arm == "onednn":
        made = prepack.linear(weight, None, weight.dtype, rows)
    else:
        made = rows_linear.stacked((weight,), (None,), weight.dtype, prepack.instruction_set())
    return made


def emulation() -> Any:
    """The emulation of the CUDA kernels, which the environment names.

    Raises:
        ValueError: it is another module.
    """
    cuda: Any = extension.load("cuda")
    if not getattr(cuda, "emulated", False):
        raise ValueError(f"the CUDA module must be the emulation: {extension.why_missing('cuda')}")
    return cuda


def has_tied_head(model: nn.Module) -> bool:
    """Whether the head's weight is the embedding."""
    return layout_of(model).tied


def ffn_sublayers(model: nn.Module) -> list[Any]:
    """The FFN sublayers of an encoder, in order."""
    return find(model).layers


def ffn_outputs(model: nn.Module) -> list[nn.Module]:
    """The last linear layer of each FFN, patched or not."""
    found = []
    for layer in ffn_sublayers(model):
        last = describe(layer).w_out
        found += [m for m in layer.modules() if getattr(m, "weight", None) is last]
    return found


def norm_module(layer: nn.Module) -> Any:
    """The norm of an FFN sublayer."""
    return lookup(layer, family_of(layer).norm)


def activation_module(layer: nn.Module) -> Any:
    """The activation of an FFN sublayer."""
    return lookup(layer, family_of(layer).act)


def state(model: nn.Module) -> Any:
    """What a patched model's modules share: its method, sites and levels."""
    return states(model)[0]


def singly(model: nn.Module, ratio: int) -> list[dict[str, dict[int, int]]]:
    """A level for every module that has plugins of ``ratio``, all others dense."""
    (state,) = states(model)
    found: dict[int, dict[str, dict[int, int]]] = {}
    pairs = zip(state.sites, state.owners, strict=True)
    for (site, owner), k in zip(pairs, state.everywhere(ratio).ratios, strict=True):
        if k > 1:
            found.setdefault(owner, {site.placement: {}})[site.placement][site.layer] = k
    return list(found.values())


def placements(words: Iterable[str]) -> tuple[str, ...]:
    """The placements of these names, in their order; ``ValueError`` for what ``patch`` refuses."""
    return tuple(configure(None, (2,), 1, "tanh", words, "auto")[0].placements)


def backend(model: nn.Module) -> str:
    """The backend that a patched model was given."""
    return state(model).method.config.backend


def kept(model: nn.Module) -> tuple[int, int, tuple[int, ...], int]:
    """What a patched model keeps whole (first and last tokens, token ids), and its bottleneck."""
    found = state(model)
    return found.kept.first, found.kept.last, found.kept.ids, found.method.config.bottleneck


def decoders() -> tuple[str, ...]:
    """The model types that are patched as decoders."""
    return tuple(family.name for family in FAMILIES.values() if family.decoder)


def set_window(model: nn.Module, window: int) -> None:
    """Another window of plain keys than a patched decoder was given."""
    for state in states(model):
        state.kept = state.kept._replace(window=window)


def cache_entries(cache: Any) -> list[int]:
    """What the last query found in each row of each layer of merged keys."""
    layers = (layer for layer in cache.layers if isinstance(layer, MergedLayer))
    return [count for layer in layers for count in layer.counts()["visible"]]


@contextmanager
def using_backend(model: nn.Module, name: str) -> Iterator[None]:
    """A patched model on another backend."""
    method = state(model).method
    before = method.config
    method.config = before._replace(backend=name)
    try:
        yield
    finally:
        method.config = before


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the copies of a model's weights that are packed now."""
    return prepack.cache.nbytes(model.parameters())


def bf16_multiplies() -> bool:
    """Whether products of vectors in bf16 are made in bf16, not in fp32, which is faster here."""
    return prepack.product_dtype(torch.bfloat16) == torch.bfloat16


def freeze_weights(model: nn.Module) -> None:
    """``vk.freeze`` of a model that is not patched and multiplies with packed weights too."""
    prepack.cache.freeze(model.parameters())


@contextmanager
def not_tracked() -> Iterator[None]:
    """Weights that are packed meanwhile are read at every look."""
    with mock.patch.object(prepack.cache, "track", False):
        yield


def rules(model: nn.Module) -> dict[str, int]:
    """How writes to a model's packed weights are noticed, and how many bytes each rule covers."""
    weights = [
        t for layer in ffn_sublayers(model) for t in describe(layer) if isinstance(t, Tensor)
    ]
    return prepack.cache.rules(weights)


def group_merge(
    x: Tensor, plugin: PluginWeights, ffn: FeedForward, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, merge and W_1h h in one kernel: merged vectors, projected tokens, softmax weights."""
    groups = make_groups(x, plugin.ratio, backend=backend)
    return merge_op.group_merge(x, plugin.merge, groups, _norm(ffn), backend)


def group_merge_backward(
    gradients: tuple[Tensor, Tensor],
    x: Tensor,
    softmax: Tensor,
    plugin: PluginWeights,
    ffn: FeedForward,
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients of x, W_c, b_c, W_1h and the norm's weight, from those of the first two outputs."""
    groups, norm = make_groups(x, plugin.ratio, backend=backend), _norm(ffn)
    return torch.ops.variator.group_merge_backward(
        *gradients, softmax, x, *plugin.merge, norm.weight, norm.bias, *groups, norm.name,
        norm.eps, backend,
    )[:5]  # fmt: skip


def adapter_decompress(
    u: Tensor, projected: Tensor, plugin: PluginWeights, x: Tensor, backend: str
) -> Tensor:
    """Adapter, broadcast and residual in one kernel."""
    groups = make_groups(projected, plugin.ratio, backend=backend)
    return decompress_op.adapter_decompress(u, projected, plugin.adapter, x, groups, backend)


def adapter_decompress_backward(
    dy: Tensor, u: Tensor, projected: Tensor, plugin: PluginWeights, backend: str
) -> tuple[Tensor, ...]:
    """Gradients of u, the projected tokens, W_1u, b_1, W_2 and b_2."""
    groups = make_groups(projected, plugin.ratio, backend=backend)
    du, *others = torch.ops.variator.adapter_decompress_backward(
        dy, u, projected, *plugin.adapter[:4], None, *groups, plugin.activation, backend
    )
    return du.view(u.shape), *others


def _norm(ffn: FeedForward) -> Norm:
    """Also the norm that a post-norm sublayer has behind: a kernel alone is measured with it."""
    return Norm(ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)


def cuda_product(a: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """One product of the CUDA kernels, its activation applied before the write."""
    from variator_kernels.ops.compressed_ffn import cuda

    return cuda.linear(a, weight, bias, activation)


def launched(call: Callable[..., Any], groups: int) -> Callable[..., Any]:
    """``call`` with the CUDA kernels in one launch for up to so many groups, 0: always in several;
    at the price of two assignments, because it is timed."""
    from variator_kernels.ops.compressed_ffn import cuda

    def run(*inputs: Any, **options: Any) -> Any:
        before, cuda.ONE_LAUNCH_GROUPS = cuda.ONE_LAUNCH_GROUPS, groups
        try:
            return call(*inputs, **options)
        finally:
            cuda.ONE_LAUNCH_GROUPS = before

    return run


@contextmanager
def buffers_apart() -> Iterator[None]:
    """Each buffer between two CUDA kernels in an allocation of its own."""
    from variator_kernels.ops.compressed_ffn import cuda

    before, cuda.BUFFERS_APART = cuda.BUFFERS_APART, True
    try:
        yield
    finally:
        cuda.BUFFERS_APART = before


def one_launch_groups(d: int, f: int, products: int, processors: int) -> int:
    """Up to how many groups a sublayer of the CUDA kernels is one launch."""
    from variator_kernels.ops.compressed_ffn import cuda

    return cuda.one_launch_groups(d, f, products, processors)


def triton_launches(
    x: Tensor,
    plugin: PluginWeights,
    ffn: FeedForward,
    mask: Tensor | None,
    offsets: Tensor | None,
    *,
    keep_first: int = 0,
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """Forward and backward of a sublayer as the Triton backend launches them, on any device."""
    from variator_kernels.ops.adapter_decompress import triton as decompress
    from variator_kernels.ops.compressed_ffn import triton as sublayer
    from variator_kernels.ops.group_merge import triton as merge

    groups = make_groups(
        x,
        plugin.ratio,
        mask=mask,
        cu_seqlens=offsets,
        backend="triton",
        keep=Keep(first=keep_first),
    )

    def forward() -> Tensor:
        return sublayer.compressed_ffn(x, plugin, ffn, groups)

    def backward(dy: Tensor) -> None:
        norm, weights = ffn.pre_norm, plugin.merge
        merged, projected, softmax = merge.group_merge(x, weights, groups, norm)
        merge.group_merge_backward(merged, projected, softmax, x, weights, groups, norm)
        decompress.adapter_decompress_backward(dy, merged, projected, plugin.adapter, groups)

    return forward, backward


def triton_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: tuple[Tensor | None, Tensor | None, Tensor | None],
    relative: DistanceBias | None,
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """Forward and backward of grouped_attention, as :func:`triton_launches`; ``visible``: bias,
    first and last."""
    from variator_kernels.ops.grouped_attention import triton

    call = Attention(queries, keys, values, Visible(*visible), relative, 0.125)

    def backward(d_out: Tensor) -> None:
        triton.grouped_attention_backward(d_out, call)

    return lambda: triton.grouped_attention(call), backward


def level(model: nn.Module) -> tuple[int, ...]:
    """The ratios of all sites that hold here."""
    return state(model).current().ratios


def runs_trained_plugins(model: nn.Module) -> bool:
    """Whether none of the plugins of the level that holds here is untrained, by their file."""
    found = state(model)
    return bool(found.plugins_of(found.current()) <= found.fitted)


def plan_of(model: nn.Module, ratios: Iterable[int]) -> Plan:
    """A plan that nothing chose: these ratios in turn over the sites of a model."""
    sites, given = state(model).sites, itertools.cycle(ratios)
    numbers = {"limit": 1.0, "predicted_cost": 1.0, "cost": 1.0, "loss": 0.0}
    chosen = tuple(next(given) for _ in sites)
    return Plan(sites, chosen, asked="cost", measure="flops", **numbers)
