"""The one rule of correctness: how far from float64 an arm may be.

The measure is the error of plain PyTorch in the same dtype. Our own arms may err at most twice as
much, plus 1e-6. Those we compare with may err eight times as much: compilers and other runtimes sum
in other orders. That can only make them faster. In int8 no error of plain PyTorch is a measure:
there a bound on the relative error tells what is quantised from what is wrong.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
FACTOR, BASELINE_FACTOR, SLACK = 2.0, 8.0, 1e-6
QUANTISED = 0.3
"""Largest relative error of int8: 0.04 to 0.17 are usual, and 1.4 has what is unrelated."""
BASELINES = ("hf", "dense", "reference", "openvino", "onnxruntime", "ctranslate2", "torchao",
             "onednn")  # fmt: skip
"""How the names of arms begin that are not ours."""


class Truth(NamedTuple):
    """What the outputs are in float64, and the largest error of each by plain PyTorch."""

    exact: Outputs
    plain: tuple[float, ...]
    relative: float | None = None
    """The largest relative error allowed, if that is the measure in place of ``plain``."""


class Verdict(NamedTuple):
    """The worst output: its error and what was allowed, and the largest relative error."""

    ok: bool
    error: float
    allowed: float
    relative: float = math.inf

    @property
    def reason(self) -> str:
        return f"error {self.error:.3g}, allowed {self.allowed:.3g}"

    def row(self) -> dict[str, Any]:
        """Whether there may be numbers, and if not, why."""
        found = {"status": "ok" if self.ok else "failed", "reason": "" if self.ok else self.reason}
        error = self.error if math.isfinite(self.error) else None
        return {**found, "error": error, "allowed": self.allowed}


def error(out: Tensor, exact: Tensor, gradients: bool = False) -> float:
    """Largest absolute difference; infinite for a wrong shape or anything not finite.

    Of ``gradients`` the root mean square, as in the tests: they are sums over all tokens, and the
    one largest rounding of plain PyTorch is too much a matter of luck to measure by.
    """
    if out.shape != exact.shape:
        return math.inf
    if out.numel() == 0:
        return 0.0
    difference = out.detach().double() - exact
    value = (difference.square().mean().sqrt() if gradients else difference.abs().max()).item()
    return value if math.isfinite(value) else math.inf


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm; infinite for a wrong shape or anything not finite."""
    if out.shape != exact.shape:
        return math.inf
    norm = exact.norm().item() or 1.0
    value = (out.detach().double() - exact).norm().item() / norm
    return value if math.isfinite(value) else math.inf


def truth(exact: Outputs, plain: Outputs) -> Truth:
    """The measure taken from float64 and from plain PyTorch in the dtype under test.

    Of several outputs (gradients), each may err as much, for its size, as plain PyTorch's worst:
    the largest error of a bias of four elements is too much a matter of luck to measure by.
    """
    exact = tuple(tensor.detach() for tensor in exact)
    scales = [_scale(tensor) for tensor in exact]
    errors = [error(p, e, len(exact) > 1) for p, e in zip(plain, exact, strict=True)]
    worst = max(e / s for e, s in zip(errors, scales, strict=True))
    if not math.isfinite(worst):
        raise ValueError("plain PyTorch itself does not give finite outputs of the right shape")
    return Truth(exact, tuple(worst * scale for scale in scales))


def _scale(tensor: Tensor) -> float:
    return max(tensor.abs().max().item(), 1e-30) if tensor.numel() else 1.0


def factor_of(arm: str) -> float:
    """Two for ours, eight for the arms that we compare with."""
    return BASELINE_FACTOR if arm.startswith(BASELINES) else FACTOR


@torch.no_grad()
def judge(outputs: Outputs, measure: Truth, factor: float = FACTOR) -> Verdict:
    """Compare every output; the verdict is on the worst."""
    if len(outputs) != len(measure.exact):
        return Verdict(False, math.inf, 0.0)
    pairs = list(zip(outputs, measure.exact, strict=True))
    relative = max(relative_error(o, exact) for o, exact in pairs)
    if measure.relative is not None:
        return Verdict(relative <= measure.relative, relative, measure.relative, relative)
    gradients = len(outputs) > 1
    errors = [error(o, exact, gradients) for o, exact in pairs]
    allowed = [factor * plain + SLACK for plain in measure.plain]
    worst = max(range(len(errors)), key=lambda i: errors[i] / allowed[i])
    return Verdict(errors[worst] <= allowed[worst], errors[worst], allowed[worst], relative)
