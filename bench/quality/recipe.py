"""How the plugins of this benchmark are trained: variants, and the settings of each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RATIOS = (2, 4, 8, 16, 32)


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


ABLATED = (4,)
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("full"),
        Variant("untrained", calibrate=False, pretrain=False, adapt=False),
        Variant("calibrated only", pretrain=False, adapt=False),
        Variant("without pre-training", pretrain=False),
        Variant("from initial values", ABLATED, calibrate=False, pretrain=False),
        Variant("without adaptation", ABLATED, adapt=False),
        Variant("mean pooling", ABLATED, frozen="merge"),
        Variant("copy", ABLATED, frozen="adapter"),
        Variant("r=40", ABLATED, bottleneck=40),
    )
}


@dataclass(frozen=True)
class Recipe:
    """Lengths of the stages. A variant with fewer ratios takes as many steps a ratio."""

    calibration_rows: int = 320
    piece: int = 64
    """Tokens of a piece of plain text."""
    pretrain_steps: int = 60
    """A ratio."""
    pretrain_batch: int = 16
    pretrain_rate: float = 5e-4
    adapt_steps: int = 150
    """A ratio."""
    adapt_batch: int = 48
    adapt_rate: float = 5e-4
    adapt_least: int = 12
    """Rows of fewer tokens are left out of adaptation: no group of theirs is ever full."""
    layer_weight: float = 0.0
    logits_weight: float = 0.5
    bf16: bool = False

    def stage(self, step: str, ratios: int) -> dict[str, Any]:
        """Fields of ``DistillationConfig`` for ``"pretrain"`` or ``"adapt"``."""
        adapt = step == "adapt"
        steps = ratios * (self.adapt_steps if adapt else self.pretrain_steps)
        return {
            "max_steps": steps,
            "learning_rate": self.adapt_rate if adapt else self.pretrain_rate,
            "per_device_train_batch_size": self.adapt_batch if adapt else self.pretrain_batch,
            "warmup_steps": steps // 20,
            "lr_scheduler_type": "linear",
            "logits_weight": self.logits_weight if adapt else 0.0,
            "layer_weight": self.layer_weight,
            "max_grad_norm": 1.0,
            "save_steps": 50,
            "logging_steps": 50,
            "bf16": self.bf16,
        }
