"""Cases of the whole encoder: Hugging Face's and the patched one."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

import variator_kernels as vk

from ..harness.checks import Outputs, Truth, truth
from ..harness.compiling import compiled
from . import Arm, Call, Case, Key, models
from .models import Architecture
from .sublayer import usable

DENSE_ARMS = ("hf", "hf-sdpa", "hf-compiled")
PLUGIN_ARMS = ("ours", "ours-compiled")
Batch = tuple[Tensor, Tensor]
"""Token ids and mask, ``[rows, n]``."""
Level = tuple[int, tuple[str, ...]]
"""A ratio and placements."""


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
    """1 is the patched model's dense forward."""
    bottleneck: int = 64
    placements: tuple[tuple[str, ...], ...] = (("ffn",),)
    """Sets of them: each has plugin arms of its own."""
    inputs: tuple[Batch, ...] = ()
    """What a call runs on; if there is none, a full batch of random tokens."""
    optimize: str | None = None
    """What ``vk.patch`` is told for the arms that are timed."""
    sdpa: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.sdpa = models.encoder(self.model, models.DTYPES[self.dtype])
        ids = models.tokens(self.batch, self.length, self.model.config.vocab_size)
        self.inputs = self.inputs or ((ids, torch.ones_like(ids)),)

    def case(self, arms: Iterable[str]) -> Case:
        """Every dense arm once, every plugin arm at each ratio with each set of placements."""
        size = (self.batch, self.length)
        case = Case("encoder", "encoder", "forward", self.model.name, self.dtype, *size,
                    self.measure, compared=self.rows)  # fmt: skip
        keys = [Key(arm) for arm in DENSE_ARMS if arm in arms]
        plugged = [arm for arm in PLUGIN_ARMS if arm in arms]
        keys += [Key(arm, k, placements=places) for k, places in self.levels for arm in plugged]
        for key in keys:
            case.arms.append(Arm(key, partial(self.build, key), self.tokens, self.bound(key)))
        return case

    @property
    def tokens(self) -> int:
        """Real ones."""
        return sum(int(mask.sum()) for _, mask in self.inputs)

    @property
    def levels(self) -> list[Level]:
        """What tells the plugin arms of one name apart. Ratio 1 is the same at all placements."""
        sets = self.placements
        return [(k, places) for k in self.ratios for places in (sets if k > 1 else sets[:1])]

    def bound(self, key: Key) -> float | None:
        """Dense over compressed multiply-adds."""
        if not key.k:
            return None
        level = dict.fromkeys(key.placements, key.k)
        used = dense = 0
        for _, mask in self.inputs:
            count = vk.flops.count(
                self.sdpa, length=mask.sum(-1).tolist(), ratio=level, bottleneck=self.bottleneck
            )
            used += count.multiply_adds.total
            dense += count.dense_multiply_adds.total
        return dense / used

    def rows(self, outputs: Outputs) -> Outputs:
        """The real tokens of the rows compared with float64, ``[tokens, d]``: a row's output
        depends on that row alone."""
        masks = [mask for _, mask in self.inputs]
        if [out.shape[:2] for out in outputs] != [mask.shape for mask in masks]:
            return ()
        real = [out[mask.bool()] for out, mask in zip(outputs, masks, strict=True)]
        if not all(bool(tokens.isfinite().all()) for tokens in real):
            return ()
        return (self._compared(outputs),)

    def _compared(self, outputs: Iterable[Tensor], taken: bool = False) -> Tensor:
        """``taken``: the outputs hold the compared rows alone."""
        found = []
        for out, (_, mask) in zip(outputs, self.inputs, strict=True):
            some = _ends(mask)
            found.append((out if taken else out[some])[mask[some].bool()])
        return torch.cat(found)

    def build(self, key: Key) -> Call:
        if key.k:
            twin = models.sharing(self.sdpa, "sdpa")
            precision = "int8" if key.dtype == "int8" else None
            settings = {"precision": precision, "optimize": self.optimize}
            model = self.patched(twin, usable("cpu"), key.placements, **settings)
            vk.set_ratio(model, key.k)
            if self.optimize:
                vk.freeze(model)  # what other runtimes promise by copying weights
        else:
            attention = "eager" if key.arm == "hf" else "sdpa"
            model = models.sharing(self.sdpa, attention)
        module: Any = LastHidden(model)
        if key.arm.endswith("-compiled"):
            module = compiled(module, whole=bool(key.k), dynamic=len(self.inputs) > 1)
        return lambda: tuple(module(ids, mask) for ids, mask in self.inputs)

    def patched(
        self, model: nn.Module, backend: str, placements: tuple[str, ...] = ("ffn",), **more: Any
    ) -> nn.Module:
        """With plugins away from zero, the same ones whatever the backend and the dtype."""
        ratios = [k for k in self.ratios if k > 1] or [2]
        vk.patch(model, ratios[0], ratios, self.bottleneck, placements=placements, backend=backend,
                 **more)  # fmt: skip
        source, kind = models.generator(5), models.DTYPES[self.dtype]
        with torch.no_grad():
            for parameter in vk.plugin_parameters(model):
                value = torch.randn(parameter.shape, generator=source)
                parameter.copy_((value * parameter.shape[-1] ** -0.5).to(kind))
        return model.requires_grad_(False)

    def measure(self, key: Key) -> Truth:
        """float64 and plain PyTorch in the dtype, on the compared rows; for all arms at once."""
        level = (key.k, key.placements) if key.k else None
        return truth((self.exact[level],), (self.plain[level],))

    @cached_property
    def exact(self) -> dict[Level | None, Tensor]:
        """In float64 on the compared rows: of the dense model, under None, and of every level."""
        return self._outputs(models.encoder(self.model, models.DTYPES[self.dtype]).double())

    @cached_property
    def plain(self) -> dict[Level | None, Tensor]:
        """The same by plain PyTorch in the dtype."""
        return self._outputs(models.sharing(self.sdpa, "eager"))

    def _outputs(self, model: Any) -> dict[Level | None, Tensor]:
        def run(twin: nn.Module) -> Tensor:
            module, pairs = LastHidden(twin), self.inputs
            outputs = (module(ids[_ends(ids)], mask[_ends(ids)]) for ids, mask in pairs)
            return self._compared(outputs, taken=True)

        found: dict[Level | None, Tensor] = {None: run(model)}
        for placements in self.placements if self.ratios else ():
            # A twin each: unpatching would drop what other arms have packed of the same weights.
            twin = models.sharing(model, model.config._attn_implementation)
            self.patched(twin, "reference", placements)
            for level in self.levels:
                if level[1] == placements:
                    vk.set_ratio(twin, level[0])
                    found[level] = run(twin)
        return found


def _ends(batch: Tensor) -> list[int]:
    """The first row and the last."""
    return sorted({0, len(batch) - 1})
