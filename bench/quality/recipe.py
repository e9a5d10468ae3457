"""How the plugins of this benchmark are trained: variants, and the settings of each stage."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

RATIOS = (2, 4, 8, 16, 32)
FEW = 5000
TARGETS = {
    ("ffn",): {2: 0.5, 4: 1.3, 8: 2.0, 16: 3.0, 32: 4.0},
    ("attention_kv",): {4: 1.0}, ("ffn", "attention_kv"): {4: 1.8},
}  # fmt: skip
"""Points that plugins for MiniLM may lose on SST-2, at most, by placements."""


def label(placements: tuple[str, ...], keep_first: int | None = None) -> str:
    """Of files and folders; empty for what ``vk.patch`` does by default."""
    parts = [] if placements == ("ffn",) else ["_".join(placements)]
    return "_".join(parts + ([] if keep_first is None else [f"keep{keep_first}"]))


@dataclass(frozen=True)
class Variant:
    """One way to make plugins; the paper's ablations are rows of :data:`VARIANTS`."""

    name: str
    ratios: tuple[int, ...] = RATIOS
    bottleneck: int = 64
    calibrate: bool = True
    """On the plain text of pre-training, or on the task's data if there is no pre-training."""
    pretrain: bool = True
    adapt: bool = True
    frozen: str = ""
    """``"merge"`` or ``"adapter"``: this part keeps its initial value, zero."""
    layers: bool = True
    """Match every layer's output; else the last one's alone, as in the paper."""
    short: bool = False
    """Trained for :attr:`Recipe.short_adapt_steps` and :attr:`Recipe.short_finish_steps`."""


ABLATED = (4,)


def _ablation(name: str, **changes: Any) -> Variant:
    """Differs from ``"k=4 alone"`` by one thing."""
    return Variant(name, ABLATED, short=True, **changes)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("full"),
        Variant("untrained", calibrate=False, pretrain=False, adapt=False),
        Variant("calibrated only", pretrain=False, adapt=False),
        _ablation("k=4 alone"),
        _ablation("without pre-training", pretrain=False),
        _ablation("from initial values", calibrate=False, pretrain=False),
        _ablation("without adaptation", adapt=False),
        _ablation("mean pooling", frozen="merge"),
        _ablation("copy", frozen="adapter"),
        _ablation("last layer alone", layers=False),
        _ablation("r=40", bottleneck=40),
    )
}


SEEDED = ("full", "calibrated only")
"""Variants of several seeds; one's calibration is a sample of its own."""
OF_ADAPTERS = ("copy", "r=40")
"""Without adapters they are what they are compared with."""


class Shortened:
    """A recipe, a dataclass whose lengths are fields that end in ``_steps``."""

    def lasting(self, share: float) -> Self:
        """This one in ``share`` of its steps."""
        made: Any = self
        steps = {
            field.name: max(1, round(share * getattr(self, field.name)))
            for field in fields(made)
            if field.name.endswith("_steps")
        }
        return replace(made, **steps)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Recipe(Shortened):
    """Lengths of the stages. All ratios of a variant share every step."""

    calibration_tokens: int = 36_000
    piece: int = 64
    """Tokens of a piece of plain text."""
    pretrain_steps: int = 100
    adapt_steps: int = 2500
    finish_steps: int = 3000
    """Of adaptation too, behind the others, with less weight on the inner layers."""
    short_adapt_steps: int = 750
    short_finish_steps: int = 300
    """For an ablation."""
    few_rows: float = 0.1
    """These steps' part for a task of less than :data:`FEW` rows."""
    batch: int = 16
    rate: float = 1.5e-3
    finish_rate: float = 1e-3
    """Each falls to zero linearly."""
    key_rate: float = 1.0
    """Times these: the rates of merges in front of attention's keys and values."""
    adapt_least: int = 16
    """Rows of fewer tokens are left out of adaptation: no group of theirs is ever full."""
    splice: float = 1.0
    """Of the rows of adaptation: mixed with another row, see :func:`noise.spliced`."""
    layer_weight: float = 3.0
    finish_layer_weight: float = 0.3
    bf16: bool = False
    attention: str = "eager"
    """While plugins train: PyTorch's fused attention has a slow backward pass on the CPU."""

    def stage(self, step: str, rows: int, variant: Variant) -> dict[str, Any]:
        """Fields of ``DistillationConfig`` for ``"pretrain"``, ``"adapt"`` or ``"finish"``."""
        ratios = len(variant.ratios)
        steps = self.pretrain_steps
        if step != "pretrain":
            steps = getattr(self, f"short_{step}_steps" if variant.short else f"{step}_steps")
            steps = max(1, round((self.few_rows if rows < FEW else 1.0) * steps))
        finish = step == "finish"
        weight = self.finish_layer_weight if finish else self.layer_weight
        return {
            "max_steps": steps, "warmup_steps": min(30, steps // 5), "lr_scheduler_type": "linear",
            "learning_rate": self.finish_rate if finish else self.rate,
            "layer_weight": weight if variant.layers else 0.0,
            "max_grad_norm": 10.0 if finish else 1.0, "per_device_train_batch_size": self.batch,
            "sample_ratios": ratios > 1, "ratios_per_step": ratios, "save_steps": 100,
            "logging_steps": 100, "bf16": self.bf16, "key_rate": self.key_rate,
        }  # fmt: skip
