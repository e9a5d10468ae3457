"""The method as sites see it: parameters for each of them, and what runs there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ... import backends
from ...ops import checks, int8_linear
from ...ops.compressed_ffn import run
from ...ops.self_attention import (
    Book,
    Keys,
    MergedKeys,
    Rotation,
    Scheme,
    SelfAttention,
    Single,
    Step,
    around,
    attend_single,
    attention_kv,
    causal_attention,
    members,
    merged_queries,
    single,
    whole_queries,
)
from ...ops.transforms import fitting
from ...runtime.context import Context
from ...runtime.level import Level
from ...runtime.state import states
from ...sites.install import attached, patched_sublayers
from ...sites.loading import ATTACHED
from ...sites.mixins import SITE
from ...sites.reach import reach_of
from ...sites.wrappers import check_present
from . import stored
from .config import VariatorConfig
from .plugin import KeyValuePlugin, Plugin


class Variator:
    """Compression plugins, one a ratio, at each site.

    The plugins of a site are ``plugins[str(k)]``.
    """

    name = "variator"

    def __init__(self, config: VariatorConfig) -> None:
        self.config = config

    @property
    def placements(self) -> dict[str, tuple[int, ...]]:
        return self.config.placements

    def _config_here(self, layer: Any) -> VariatorConfig:
        """With the precision that holds in this forward."""
        config = self.config
        if config.precision is None:
            return config
        return config._replace(precision=int8_linear.here(config.precision, layer.training))

    def parameters(
        self, placement: str, hidden_size: int, like: Tensor, training: bool
    ) -> nn.ModuleDict:
        """New plugins of one site, on the device and of the dtype of ``like``."""
        config = self.config
        where: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        plugins: dict[str, nn.Module] = {}
        for k in config.placements[placement]:
            if placement == "attention_kv":
                plugins[str(k)] = KeyValuePlugin(hidden_size, k, **where)
            else:
                plugins[str(k)] = Plugin(
                    hidden_size, k, config.bottleneck, config.activation, **where
                )
        return nn.ModuleDict(plugins).train(training)

    def feed_forward(
        self, layer: Any, x: Tensor, ratio: int, context: Context, dense: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The compressed sublayer, norm to residual (paper section 3.2): ``x [B, n, d]``."""
        # Not layer.plugins[...]: looking modules up by attribute takes microseconds.
        plugin: Any = layer._modules[ATTACHED]._modules[str(ratio)]
        ffn = layer.feed_forward()
        asked = plugin.prepared.of(plugin, ffn, x, self._config_here(layer))
        weights, ffn, backend = asked
        backend = fitting(self.config.backend, backend)
        return run(x, weights, ffn, context.groups(x, ratio, backend), backend)

    def attention(
        self,
        layer: Any,
        x: Tensor,
        ratio: int,
        context: Context,
        rotation: Rotation | None,
    ) -> Tensor:
        """The sublayer with merged keys and values (``attention_kv``), or compressed as a whole
        (``attention``): ``x [B, n, d]``."""
        plugin: Any = layer._modules[ATTACHED]._modules[str(ratio)]
        config, site = self._config_here(layer), layer.variator_site.site
        if site.placement == "attention_kv":
            asked = plugin.prepared.of(plugin, layer.self_attention(), x, config)
            weights, attention, backend = asked
            backend = fitting(config.backend, backend)
            keys, merged_rotation = _merged_keys(layer, x, ratio, context, attention, backend)
            rotations = None
            if rotation is not None:
                assert merged_rotation is not None
                rotations = rotation, merged_rotation
            groups = context.groups(x, ratio, backend)
            return attention_kv(
                x, weights, attention, groups, keys, rotations, backend, config.backend
            )
        attention = layer.self_attention()._replace(pack=config.pack, precision=config.precision)
        backend = fitting(config.backend, backends.resolve(config.backend, x))
        attention.check(x)
        keys, merged_rotation = _merged_keys(layer, x, ratio, context, attention, backend)
        rotations = None if merged_rotation is None else (merged_rotation, merged_rotation)
        sublayer = around(attention, keys, rotations, backend, config.backend)
        check_present(plugin)
        weights = plugin.weights()
        checks.compressed_ffn(x, weights, sublayer)
        return run(x, weights, sublayer, context.groups(x, ratio, backend), backend)

    def causal_attention(
        self,
        layer: Any,
        h: Tensor,
        scheme: Scheme,
        context: Context,
        rotation: Rotation | None,
        store: MergedKeys | None,
    ) -> Tensor:
        """A decoder's sublayer over merged keys, without norm and residual: ``h [B, n, d]``."""
        plugin: Any = layer._modules[ATTACHED]._modules[str(scheme.ratio)]
        asked = plugin.prepared.of(plugin, layer.self_attention(), h, self._config_here(layer))
        weights, attention, backend = asked
        backend = fitting(self.config.backend, backend)
        step, one = _step(scheme, h, context, store)
        reach = reach_of(layer)

        def merged_rotation() -> Rotation:
            key = (
                "merged rotation",
                scheme,
                h.device,
                h.dtype,
                reach.rotary,
                reach.rotary_kind,
                step,
            )
            return context.once(key, h, lambda: reach.rotation(h, (one or step).mean_positions))

        rotations = None if rotation is None else (rotation, merged_rotation)
        if one is not None and store is not None and backend == "cpu":
            y = attend_single(h, weights, attention, one, rotations, store)
            if y is not None:
                return y
        return causal_attention(h, weights, attention, step, rotations, store, backend)

    def is_trained(self, layer: Any, ratio: int) -> bool:
        """Whether a plugin differs from the one it starts as, or nobody can tell."""
        return any(
            weight.is_meta
            or type(weight) is not nn.Parameter
            or not weight.numel()  # another process has it
            or bool(weight.any())
            for name, weight in layer.plugins[str(ratio)].named_parameters()
            if name in stored.ZERO_AT_FIRST
        )


def _step(
    scheme: Scheme, h: Tensor, context: Context, store: MergedKeys | None
) -> tuple[Step, Single | None]:
    """What this forward means to caches under ``scheme``; made once for all layers of it."""
    rows = h.shape[0]
    past = Book.empty(rows, h.device) if store is None else store.before(rows, h.device)
    if past.columns != context.past:
        raise ValueError(
            f"past_key_values must hold as many tokens in every layer, got {past.columns} in one "
            f"and {context.past} in the first"
        )

    def make() -> tuple[Step, Single | None]:
        real = context.mask_of(h)
        if real is not None and bool(real.all()):
            real = None  # padding is behind these columns: they are written where they belong
        wide = torch.promote_types(h.dtype, torch.float32)
        step = Step(scheme, past, real, context.positions(h), wide)
        return step, None if store is None else single(h, step)

    return context.once(("step", scheme, h.device, h.dtype), h, make)


def _merged_keys(
    layer: Any,
    x: Tensor,
    ratio: int,
    context: Context,
    attention: SelfAttention,
    backend: str,
) -> tuple[Keys, Rotation | None]:
    """What holds of the merged keys in this forward; made once for all layers that share it."""
    listed = context.groups(x, ratio, "cpu" if backend == "cpu" else "reference")
    here = ratio, x.device
    tokens = context.once(("members", here), x, lambda: members(listed, x))
    reach, placement = reach_of(layer), layer.variator_site.site.placement
    embedding, window = reach.table, attention.window
    terms = reach.terms(x, attention, context.carried, embedding)
    make = whole_queries if placement == "attention_kv" else merged_queries

    def keys() -> Keys:
        return make(tokens, x, terms)

    if torch.is_grad_enabled() and any(weight.requires_grad for weight in terms.weights):
        found = keys()  # part of the graph of this call alone
    else:
        key = "keys", placement, here, x.dtype, embedding, window, reach.global_table
        found = context.once(key, x, keys)
    if reach.rotary is None:
        return found, None

    def rotation() -> Rotation:
        return reach.rotation(x, tokens.mean(context.positions(x)))

    name = "rotation", here, x.dtype, reach.rotary, reach.rotary_kind
    return found, context.once(name, x, rotation)


def plugin_parameters(model: nn.Module, ratios: Iterable[int] | None = None) -> list[nn.Parameter]:
    """The parameters of all plugins, or of those of ``ratios``: what there is to train.

    Raises:
        ValueError: the model is not patched, or has no plugins for one of ``ratios``.
    """
    wanted = None if ratios is None else tuple(ratios)
    for state in states(model):
        for k in wanted or ():
            if k not in state.ratios:
                raise ValueError(f"ratios must have plugins, {state.ratios}, got {k!r}")
    return [
        parameter
        for plugins in attached(model)
        for k, plugin in plugins.items()
        if wanted is None or int(k) in wanted
        for parameter in plugin.parameters()
    ]


def level_parameters(model: nn.Module, levels: Iterable[Level]) -> list[nn.Parameter]:
    """The parameters of the plugins that run at some of ``levels``, of a model with one encoder."""
    wanted = {(number, k) for level in levels for number, k in enumerate(level.ratios) if k > 1}
    return [
        parameter
        for layer in patched_sublayers(model)
        for k, plugin in layer._modules[ATTACHED].items()  # type: ignore[operator, union-attr]
        if (vars(layer)[SITE].number, int(k)) in wanted
        for parameter in plugin.parameters()
    ]
