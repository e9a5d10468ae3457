"""Cases of the FFN sublayer, norm to residual: forward, ragged, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from variator_kernels import functional
from variator_kernels.ops.feed_forward import FeedForward, PluginWeights, normalize, products
from variator_kernels.sites.feed_forward import describe

from . import backend_status, cost, dense, models
from .cells import Arm, Call, Case, Key
from .checks import Outputs, Truth, truth
from .compiling import compiled
from .models import Architecture

DENSE_ARMS = ("hf", "hf-compiled", "dense-packed")
PLUGIN_ARMS = ("reference", "reference-compiled", "ours", "ours-compiled")
BACKWARD_ARMS = ("reference", "reference-compiled", "ours")
RAGGED_ARMS = ("reference", "ours")


class Plugged(nn.Module):
    """The compressed sublayer as a module, so that a compiler sees its weights as parameters."""

    def __init__(self, ffn: FeedForward, plugin: PluginWeights, backend: str, train: bool = False):
        super().__init__()
        self.backend, self.fields = backend, (ffn._asdict(), plugin._asdict())
        for prefix, fields in zip(("ffn", "plugin"), self.fields, strict=True):
            for name, value in fields.items():
                if isinstance(value, Tensor):
                    grad = train and prefix == "plugin"
                    self.register_parameter(f"{prefix}_{name}", nn.Parameter(value.detach(), grad))

    def weights(self, cls: type, prefix: str, fields: dict[str, Any]) -> Any:
        values = (getattr(self, f"{prefix}_{name}", value) for name, value in fields.items())
        return cls(*values)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        ffn = self.weights(FeedForward, "ffn", self.fields[0])
        plugin = self.weights(PluginWeights, "plugin", self.fields[1])
        return functional.compressed_ffn(x, plugin, ffn, mask=mask, backend=self.backend)


@dataclass
class Sublayer:
    """Weights and input of one measurement; makes its cases."""

    model: Architecture
    dtype: str
    batch: int
    length: int
    bottleneck: int = 64
    layer: nn.Module = field(init=False)
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        config, kind = self.model.config, models.DTYPES[self.dtype]
        self.layer = models.sublayer(self.model, kind)
        self.ffn = describe(self.layer)
        self.x = models.hidden(self.batch, self.length, config.hidden_size, kind)
        self.mask = models.ragged_mask(self.batch, self.length)
        self.dense_variant = ""

    def plugin(self, k: int) -> PluginWeights:
        kind = models.DTYPES[self.dtype]
        return models.plugin(self.model.config, k, self.bottleneck, kind)

    def case(self, name: str, measure: Callable[[Key], Truth]) -> Case:
        direction = "backward" if name == "backward" else "forward"
        return Case(name, "sublayer", direction, self.dtype, self.batch, self.length, measure)

    def forward(self, arms: Iterable[str], ratios: Iterable[int], name: str = "sublayer") -> Case:
        """Every dense arm once, every plugin arm at each ratio."""
        case = self.case(name, self.measure)
        for name in (arm for arm in DENSE_ARMS if arm in arms):
            case.arms.append(self.arm(Key(name), partial(self.dense, name)))
        for k in ratios:
            for name in (arm for arm in PLUGIN_ARMS if arm in arms):
                case.arms.append(self.arm(Key(name, k), partial(self.plugged, name, k)))
        return case

    def ragged(self, arms: Iterable[str], ratios: Iterable[int]) -> Case:
        """Full and right-padded batches beside each other."""
        case = self.case("ragged", self.measure)
        for k in ratios:
            for name in (arm for arm in RAGGED_ARMS if arm in arms):
                for padding, mask in (("none", None), ("ragged", self.mask)):
                    key = Key(name, k, padding)
                    case.arms.append(self.arm(key, partial(self.plugged, name, k, mask)))
        return case

    def backward(self, arms: Iterable[str], ratios: Iterable[int]) -> Case:
        """Forward and backward: gradients of the input and of the plugin, the FFN frozen."""
        case = self.case("backward", self.measure_backward)
        for k in ratios:
            for name in (arm for arm in BACKWARD_ARMS if arm in arms):
                case.arms.append(self.arm(Key(name, k), partial(self.gradients, name, k)))
        return case

    def arm(self, key: Key, build: Callable[[], Call]) -> Arm:
        ragged = key.padding == "ragged"
        lengths = self.mask.sum(-1).tolist() if ragged else [self.length] * self.batch
        bound = cost.sublayer_bound(self.model.config, lengths, key.k, self.bottleneck)
        detail = (lambda: self.dense_variant) if key.arm == "dense-packed" else (lambda: "")
        return Arm(key, build, sum(lengths), bound, detail)

    def dense(self, name: str) -> Call:
        call: Callable[[Tensor], Tensor] = self.layer
        if name == "hf-compiled":
            call = compiled(self.layer)
        elif name == "dense-packed":
            self.dense_variant, call = dense.fastest(self.layer, self.x)
        return lambda: (call(self.x),)

    def plugged(self, name: str, k: int, mask: Tensor | None = None) -> Call:
        module: Any = Plugged(self.ffn, self.plugin(k), backend_status.of(name))
        call = compiled(module, whole=True) if name.endswith("-compiled") else module
        return lambda: (call(self.x, mask),)

    def gradients(self, name: str, k: int) -> Call:
        module = Plugged(self.ffn, self.plugin(k), backend_status.of(name), train=True)
        call = compiled(module, freeze=False, whole=True) if name.endswith("-compiled") else module
        return self._step(call, [p for p in module.parameters() if p.requires_grad])

    def dense_gradients(self) -> Call:
        """Of the dense sublayer, frozen: the gradient of the input."""
        return self._step(self.layer, [])

    def _step(
        self,
        call: Callable[[Tensor], Tensor],
        plugin: Sequence[Tensor],
        dtype: torch.dtype | None = None,
    ) -> Call:
        """Output and gradients; the incoming gradient is the input's values."""

        def step() -> Outputs:
            x = self.x.to(dtype or self.x.dtype).detach().requires_grad_()
            y = call(x)
            return (y.detach(), *torch.autograd.grad(y, (x, *plugin), x.detach().to(y.dtype)))

        return step

    def measure(self, key: Key) -> Truth:
        """The forward in float64, and in the dtype by plain PyTorch."""
        if key.k is None:
            return truth((self.dense_exact(self.x.double()),), (self.layer(self.x),))
        mask = self.mask if key.padding == "ragged" else None
        ffn, plugin = models.widened(self.ffn), models.widened(self.plugin(key.k))
        wide = Plugged(ffn, plugin, "reference")(self.x.double(), mask)
        return truth((wide,), self.plugged("reference", key.k, mask)())

    def dense_exact(self, x: Tensor) -> Tensor:
        """Not the layer itself in float64: its norm would still compute in fp32."""
        ffn = models.widened(self.ffn)
        norm = (ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)
        out = products(x if ffn.post_norm else normalize(x, *norm), ffn)
        out = x + out if ffn.residual else out
        return normalize(out, *norm) if ffn.post_norm else out

    def measure_backward(self, key: Key) -> Truth:
        """The same for output and gradients."""
        if key.k is None:
            exact = self._step(self.dense_exact, [], torch.float64)()
            return truth(exact, self.dense_gradients()())
        ffn, plugin = models.widened(self.ffn), models.widened(self.plugin(key.k))
        module = Plugged(ffn, plugin, "reference", train=True)
        trained = [p for p in module.parameters() if p.requires_grad]
        exact = self._step(module, trained, torch.float64)()
        return truth(exact, self.gradients("reference", key.k)())
