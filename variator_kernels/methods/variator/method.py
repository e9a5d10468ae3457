"""The method as sites see it: parameters for each of them, and what runs there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ...ops.compressed_ffn import run
from ...ops.transforms import fitting
from ...runtime.context import Context
from ...runtime.state import states
from ...sites.install import attached
from ...sites.loading import ATTACHED
from .config import VariatorConfig
from .plugin import Plugin


class Variator:
    """Compression plugins, one a ratio, around each feed-forward site.

    The plugins of a site are ``plugins[str(k)]``.
    """

    name = "variator"

    def __init__(self, config: VariatorConfig) -> None:
        self.config = config

    @property
    def ratios(self) -> tuple[int, ...]:
        return self.config.ratios

    def parameters(self, hidden_size: int, like: Tensor, training: bool) -> nn.ModuleDict:
        """New plugins of one site, on the device and of the dtype of ``like``."""
        config = self.config
        plugins = {
            str(k): Plugin(
                hidden_size,
                k,
                config.bottleneck,
                config.activation,
                device=like.device,
                dtype=like.dtype,
            )
            for k in config.ratios
        }
        return nn.ModuleDict(plugins).train(training)

    def feed_forward(
        self, layer: Any, x: Tensor, ratio: int, context: Context, dense: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The compressed sublayer, norm to residual (paper section 3.2): ``x [B, n, d]``."""
        # Not layer.plugins[...]: looking modules up by attribute takes microseconds.
        plugin: Any = layer._modules[ATTACHED]._modules[str(ratio)]
        ffn = layer.feed_forward()
        asked = plugin.prepared.of(plugin, ffn, x, self.config.backend, self.config.pack)
        weights, ffn, backend = asked
        backend = fitting(self.config.backend, backend)
        return run(x, weights, ffn, context.groups(x, ratio, backend), backend)

    def is_trained(self, layer: Any, ratio: int) -> bool:
        """Whether a plugin differs from the one it starts as, or nobody can tell."""
        plugin = layer.plugins[str(ratio)]
        return any(
            weight.is_meta or type(weight) is not nn.Parameter or bool(weight.any())
            for weight in (plugin.adapter.w2, plugin.merge.weight)
        )


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
