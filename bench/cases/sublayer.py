"""The FFN sublayer, norm to residual, on a CPU or a GPU: forward, ragged, forward with backward."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from variator_kernels import FeedForward, PluginWeights, backends, flops, functional

from .. import internals
from ..harness.checks import Outputs, Truth, truth
from ..harness.compiling import Unavailable, compiled
from . import Arm, Call, Case, Key, Work, dense, models
from .models import Architecture

DENSE_ARMS = ("hf", "hf-compiled", "dense-packed")
PLUGIN_ARMS = ("reference", "reference-compiled", "ours", "ours-compiled")
GPU_ARMS = ("cuda", "cuda-launches", "cuda-one")
"""Beside ``ours``, which is Triton's there. The second always takes several launches, the third
always one (where the bottleneck allows it)."""
LAUNCHES = {"cuda-launches": 0, "cuda-one": 2**62}
"""Up to how many groups are one launch."""
OF_CASE = {
    "backward": ("reference", "reference-compiled", "ours", "cuda"),
    "ragged": ("reference", "ours"),
}
"""The arms of these cases; the others have all."""
# Without its CUDA graphs: every arm on a GPU is captured the same way.
GPU_COMPILER: dict[str, Any] = {"freeze": False, "mode": "max-autotune-no-cudagraphs"}


def usable(name: str) -> str:
    """The backend's name; raises ``Unavailable`` where it cannot run."""
    status = next(s for s in backends.status() if s.name == name)
    if not status.usable:
        raise Unavailable(status.detail)
    return name


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
    device: str = "cpu"
    kernels: str = "cpu"
    """The backend of ``ours``."""
    layer: nn.Module = field(init=False)
    ffn: FeedForward = field(init=False)
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        kind = models.DTYPES[self.dtype]
        self.layer, self.ffn = models.sublayer(self.model, kind)
        self.layer.to(self.device)  # in place: the weights that ``ffn`` holds move along
        self.d, self.f = self.model.config.hidden_size, models.inner_size(self.model.config)
        self.x = models.hidden(self.batch, self.length, self.d, kind).to(self.device)
        self.mask = models.ragged_mask(self.batch, self.length).to(self.device)
        self.dense_variant = ""

    def case(self, arms: Iterable[str], ratios: Iterable[int], name: str = "sublayer") -> Case:
        """Every dense arm once, every plugin arm at each ratio.

        ``"ragged"`` has full and right-padded batches beside each other. ``"backward"`` takes the
        gradients of the input and of the plugin too, the FFN frozen.
        """
        backward = name == "backward"
        direction, model = "backward" if backward else "forward", self.model.name
        case = Case(name, "sublayer", direction, model, self.dtype, self.batch, self.length,
                    partial(self.measure, backward=backward))  # fmt: skip
        wanted = set(arms) & set(OF_CASE.get(name, arms))
        keys = [Key(arm) for arm in DENSE_ARMS if arm in wanted]
        paddings = ("none", "ragged") if name == "ragged" else ("none",)
        for k in ratios:
            plugged = (arm for arm in (*PLUGIN_ARMS, *GPU_ARMS) if arm in wanted)
            keys += [Key(arm, k, padding) for arm in plugged for padding in paddings]
        case.arms = [self.arm(key, backward) for key in keys]
        return case

    def arm(self, key: Key, backward: bool) -> Arm:
        """What an arm does, and the least that it must do."""
        ragged = key.padding == "ragged"
        lengths = self.mask.sum(-1).tolist() if ragged else [self.length] * self.batch
        dense_macs, macs = self.macs(lengths, None), self.macs(lengths, key.k)
        # x is read twice and y written once; what is left is group-sized.
        moved = 3 * self.x.numel() * self.x.element_size()
        work = () if backward else (Work(bytes=moved), Work(flops=2 * macs))
        detail = (lambda: self.dense_variant) if key.arm == "dense-packed" else (lambda: "")
        bound = dense_macs / macs if key.k else None
        return Arm(key, partial(self.build, key, backward), sum(lengths), bound, work, detail)

    def macs(self, lengths: list[int], k: int | None) -> int:
        """Multiply-adds of rows of these lengths: dense, or at ratio k."""
        tokens, groups = sum(lengths), sum(-(-n // k) for n in lengths) if k else 0
        ffn = flops.ffn_macs(self.d, self.f, self.ffn.w_gate is not None)
        if not k:
            return tokens * ffn
        plugin = flops.merge_macs(tokens, self.d, k)
        return (
            groups * ffn + plugin + flops.decompress_macs(tokens, groups, self.d, self.bottleneck)
        )

    def plugin(self, k: int) -> PluginWeights:
        """The same random plugin of a ratio in every call."""
        made = models.plugin(self.model.config, k, self.bottleneck, models.DTYPES[self.dtype])
        return models.moved(made, self.device)

    def build(self, key: Key, backward: bool = False) -> Call:
        """What an arm runs; raises ``Unavailable`` where it cannot."""
        module = self.plugged(key.arm, key.k, backward) if key.k else self.dense(key.arm)
        if backward:
            every: Any = getattr(module, "parameters", list)()
            return self.step(module, [p for p in every if p.requires_grad])
        masks = (self.mask,) if key.padding == "ragged" else ()
        return lambda: (module(self.x, *masks),)

    def dense(self, name: str) -> Callable[..., Tensor]:
        """A dense arm."""
        if name == "dense-packed":
            self.dense_variant, call = dense.fastest(self.layer, self.ffn, self.x)
            return call
        compiler = GPU_COMPILER if self.device == "cuda" else {}
        return compiled(self.layer, **compiler) if name == "hf-compiled" else self.layer

    def plugged(self, name: str, k: int, train: bool = False) -> Callable[..., Tensor]:
        """An arm of the plugin at ratio ``k``."""
        backend = name.partition("-")[0]
        if backend != "reference":
            backend = usable(self.kernels if backend == "ours" else backend)
        module: Any = Plugged(self.ffn, self.plugin(k), backend, train)
        if name in LAUNCHES:
            return internals.launched(module, LAUNCHES[name])
        if not name.endswith("-compiled"):
            return module
        options = GPU_COMPILER if self.device == "cuda" else {"freeze": not train}
        return compiled(module, whole=True, **options)

    def step(self, call: Callable[[Tensor], Tensor], plugin: list[Any], wide: bool = False) -> Call:
        """Output and gradients; the incoming gradient is the input's values."""

        def run() -> Outputs:
            x = self.x.detach().to(torch.float64 if wide else self.x.dtype).requires_grad_()
            y = call(x)
            return (y.detach(), *torch.autograd.grad(y, (x, *plugin), x.detach().to(y.dtype)))

        return run

    def measure(self, key: Key, backward: bool = False) -> Truth:
        """The outputs in float64, and in the dtype by plain PyTorch."""
        ffn = models.moved(self.ffn, torch.float64)
        module: Any = partial(dense.plain, ffn)
        if key.k:
            weights = models.moved(self.plugin(key.k), torch.float64)
            module = Plugged(ffn, weights, "reference", backward)
        plain = self.build(key._replace(arm="reference" if key.k else "hf"), backward)
        if backward:
            trained = [p for p in module.parameters() if p.requires_grad] if key.k else []
            return truth(self.step(module, trained, wide=True)(), plain())
        masks = (self.mask,) if key.padding == "ragged" else ()
        return truth((module(self.x.double(), *masks),), plain())
