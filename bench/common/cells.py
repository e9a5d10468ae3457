"""A case: arms that run on one input, checked, warmed up, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from . import timing
from .checks import Outputs, Truth, Verdict, factor_of, judge
from .compiling import Unavailable
from .results import Row

Call = Callable[[], Outputs]
BASELINES = ("dense-packed", "hf-sdpa", "hf", "reference", "reference-compiled")
DENSE = ("dense-packed", "hf-sdpa", "hf")


class Key(NamedTuple):
    """What tells the arms of a case apart."""

    arm: str
    k: int | None = None
    padding: str = "none"


@dataclass
class Arm:
    """One way to compute; ``build`` returns the call, or raises ``Unavailable``."""

    key: Key
    build: Callable[[], Call]
    tokens: int
    bound: float | None = None
    detail: Callable[[], str] = lambda: ""


@dataclass
class Case:
    """Arms on one input; ``name`` says what for, ``truth`` what an arm must produce."""

    name: str
    scope: str
    direction: str
    dtype: str
    batch: int
    length: int
    truth: Callable[[Key], Truth]
    arms: list[Arm] = field(default_factory=list)
    compared: Callable[[Outputs], Outputs] = lambda outputs: outputs

    @property
    def title(self) -> str:
        kind = self.scope if self.name == self.scope else f"{self.scope}, {self.name}"
        return f"{kind}, {self.dtype}, {self.batch} x {self.length}"


@dataclass
class Progress:
    """Where a run tells how far it is."""

    start: Callable[[str, int], None] = lambda title, steps: None
    step: Callable[[str], None] = lambda what: None


def run(case: Case, rounds: int, warmup: int, strict: bool, progress: Progress) -> list[Row]:
    """Rows of the case, in the order of its arms. A failed arm's row holds no number.

    ``strict``: an arm that is not available counts as failed, not as skipped.
    """
    progress.start(case.title, len(case.arms) * (1 + rounds))
    rows = {arm.key: _row(case, arm) for arm in case.arms}
    truths: dict[Any, Truth] = {}
    calls: dict[Key, Call] = {}
    with torch.set_grad_enabled(case.direction == "backward"):
        for arm in case.arms:
            progress.step(f"check {_label(arm.key)}")
            row = rows[arm.key]
            try:
                measure = (arm.key.k, arm.key.padding)
                if measure not in truths:
                    truths[measure] = case.truth(arm.key)
                call = arm.build()
                _judge(case, arm.key, row, call(), truths[measure])
                for _ in range(warmup):
                    call()
                row["detail"] = arm.detail()
            except Unavailable as reason:
                row.update(status="failed" if strict else "skipped", reason=str(reason))
            except Exception as error:
                row.update(status="failed", reason=_first_line(error))
            if row["status"] == "ok":
                calls[arm.key] = call
            else:
                for _ in range(rounds):  # its turns will not come
                    progress.step(str(row["status"]))

        def advance() -> None:
            progress.step("timing")

        settle = case.scope == "sublayer"  # an encoder is far larger than any cache
        samples, outputs = timing.interleave(calls, rounds, advance, settle)
        for key, out in outputs.items():
            _judge(case, key, rows[key], out, truths[key.k, key.padding])
    good = {key: value for key, value in samples.items() if rows[key]["status"] == "ok"}
    for key, seconds in good.items():
        _numbers(rows[key], seconds, good)
    return list(rows.values())


def _label(key: Key) -> str:
    return key.arm if key.k is None else f"{key.arm} k={key.k}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _row(case: Case, arm: Arm) -> Row:
    return {
        "case": case.name,
        "scope": case.scope,
        "direction": case.direction,
        "dtype": case.dtype,
        "batch": case.batch,
        "length": case.length,
        "padding": arm.key.padding,
        "tokens": arm.tokens,
        "arm": arm.key.arm,
        "k": arm.key.k,
        "bound": arm.bound,
        "status": "ok",
        "reason": "",
        "detail": "",
        "error": None,
        "allowed": None,
    }


def _judge(case: Case, key: Key, row: Row, out: Outputs, measure: Truth) -> None:
    verdict: Verdict = judge(case.compared(out), measure, factor_of(key.arm))
    row["error"] = verdict.error if verdict.error != float("inf") else None
    row["allowed"] = verdict.allowed
    if not verdict.ok:
        reason = f"error {verdict.error:.3g}, allowed {verdict.allowed:.3g}"
        row.update(status="failed", reason=reason)


def _numbers(row: Row, seconds: list[float], samples: dict[Key, list[float]]) -> None:
    """Times, time a token, and speed-up over each baseline of the same rounds."""
    row.update(samples=seconds, **timing.quartiles(seconds))
    row["ns_per_token"] = row["median"] / max(row["tokens"], 1) * 1e9
    row["speedup"] = {}
    for name in BASELINES:
        key = Key(name, None if name in DENSE else row["k"], row["padding"])
        if key in samples and (row["k"] is not None or name in DENSE):
            row["speedup"][name] = timing.ratio(samples[key], seconds)
    dense = next((row["speedup"][name] for name in DENSE if name in row["speedup"]), None)
    row["above_bound"] = bool(dense and row["bound"] and dense["median"] > row["bound"])
