"""Cases of the whole encoder: Hugging Face's, other runtimes, and the patched one."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import variator_kernels as vk

from ..harness.checks import Outputs, Truth, truth
from ..harness.compiling import Unavailable, compiled
from . import Arm, Call, Case, Key, models
from .models import Architecture
from .sublayer import usable

DENSE_ARMS = ("hf", "hf-sdpa", "hf-compiled", "openvino")
PLUGIN_ARMS = ("ours", "ours-compiled")


class LastHidden(nn.Module):
    """The encoder with tensors in and a tensor out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


@dataclass
class Encoder:
    """One encoder's weights, shared by all arms, and its input."""

    model: Architecture
    dtype: str
    batch: int
    length: int
    ratios: tuple[int, ...]
    bottleneck: int = 64
    placements: tuple[tuple[str, ...], ...] = (("ffn",),)
    """Sets of them: each has plugin arms of its own."""
    sdpa: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.sdpa = models.encoder(self.model, models.DTYPES[self.dtype])
        self.ids = models.tokens(self.batch, self.length, self.model.config.vocab_size)
        self.mask = torch.ones_like(self.ids)
        self.checked = sorted({0, self.batch - 1})
        self._truths: dict[Any, Truth] = {}

    def case(self, arms: Iterable[str]) -> Case:
        """Every dense arm once, every plugin arm at each ratio with each set of placements."""
        size = (self.batch, self.length)
        case = Case("encoder", "encoder", "forward", self.model.name, self.dtype, *size,
                    self.measure, compared=self.rows)  # fmt: skip
        keys = [Key(arm) for arm in DENSE_ARMS if arm in arms]
        keys += [Key(arm, *rest) for rest in self.levels for arm in PLUGIN_ARMS if arm in arms]
        for key in keys:
            bound = self.bound(key) if key.k else None
            case.arms.append(Arm(key, partial(self.build, key), self.ids.numel(), bound))
        return case

    @property
    def levels(self) -> list[tuple[Any, ...]]:
        """What tells the plugin arms of one name apart: the fields of a key behind the name."""
        return [(k, "none", places) for k in self.ratios for places in self.placements]

    def bound(self, key: Key) -> float:
        """Dense over compressed multiply-adds."""
        level = dict.fromkeys(key.placements, key.k)
        size = (self.batch, self.length)
        return 1 / vk.flops.count(self.sdpa, *size, level, self.bottleneck).fraction_left

    def rows(self, outputs: Outputs) -> Outputs:
        """The rows compared with float64: a row's output depends on that row alone."""
        finite = all(bool(out.isfinite().all()) for out in outputs)
        return tuple(out[self.checked] for out in outputs) if finite else ()

    def build(self, key: Key) -> Call:
        if key.arm == "openvino":
            return self.openvino()
        if key.k:
            twin = models.sharing(self.sdpa, "sdpa")
            model = self.patched(twin, usable("cpu"), key.placements)
            vk.set_ratio(model, key.k)
        else:
            attention = "eager" if key.arm == "hf" else "sdpa"
            model = models.sharing(self.sdpa, attention)
        module: Any = LastHidden(model)
        call = compiled(module, whole=bool(key.k)) if key.arm.endswith("-compiled") else module
        return lambda: (call(self.ids, self.mask),)

    def patched(
        self, model: nn.Module, backend: str, placements: tuple[str, ...] = ("ffn",)
    ) -> nn.Module:
        """With plugins away from zero, the same ones whatever the backend and the dtype."""
        vk.patch(model, self.ratios[0], self.ratios, self.bottleneck, placements=placements,
                 backend=backend)  # fmt: skip
        source, kind = models.generator(5), models.DTYPES[self.dtype]
        with torch.no_grad():
            for parameter in vk.plugin_parameters(model):
                value = torch.randn(parameter.shape, generator=source)
                parameter.copy_((value * parameter.shape[-1] ** -0.5).to(kind))
        return model.requires_grad_(False)

    def measure(self, key: Key) -> Truth:
        """float64 and plain PyTorch in the dtype, on the compared rows; for all arms at once."""
        if not self._truths:
            exact = self._outputs(models.encoder(self.model, models.DTYPES[self.dtype]).double())
            plain = self._outputs(models.sharing(self.sdpa, "eager"))
            self._truths = {level: truth((exact[level],), (plain[level],)) for level in exact}
        return self._truths[key[1:] if key.k else None]

    def _outputs(self, model: Any) -> dict[Any, Tensor]:
        """Of the dense model, under None, and of every level."""
        module = LastHidden(model)
        ids, mask = self.ids[self.checked], self.mask[self.checked]
        found: dict[Any, Tensor] = {None: module(ids, mask)}
        for placements in self.placements if self.ratios else ():
            # A twin each: unpatching would drop what other arms have packed of the same weights.
            twin = models.sharing(model, model.config._attn_implementation)
            module = LastHidden(self.patched(twin, "reference", placements))
            for level in self.levels:
                if level[-1] == placements:
                    vk.set_ratio(twin, level[0])
                    found[level] = module(ids, mask)
        return found

    def openvino(self) -> Call:
        """OpenVINO's CPU plugin on the same weights."""
        try:
            import openvino as ov
        except ImportError as error:
            raise Unavailable("openvino is not installed") from error
        if self.dtype == "fp16":
            raise Unavailable("openvino: fp32 and bf16 only")
        wide = models.sharing(models.encoder(self.model, torch.float32), "sdpa")
        with torch.no_grad():
            if self.dtype == "bf16":
                for parameter in wide.parameters():
                    parameter.copy_(parameter.bfloat16())
            graph = ov.convert_model(LastHidden(wide), example_input=(self.ids, self.mask))
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.dtype == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": str(min(torch.get_num_threads(), os.cpu_count() or 1)),
        }
        network = ov.Core().compile_model(graph, "CPU", options)
        inputs = [self.ids.numpy(), self.mask.numpy()]
        return lambda: (torch.from_numpy(network(inputs)[0]),)
