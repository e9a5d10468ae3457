"""Runs a case on any clock: arms are checked, warmed up, timed in turns, and checked again."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..cases import Arm, Call, Case, Key
from .checks import Outputs, Truth, factor_of, judge
from .clock import Graph, Wall, quartiles, ratio
from .compiling import Unavailable
from .results import Row

DENSE = ("dense-packed", "hf-sdpa", "hf")
"""What a speed-up is over, the strongest first."""


@dataclass
class Progress:
    """Where a run tells how far it is."""

    start: Callable[[str, int], None] = lambda title, steps: None
    step: Callable[[str], None] = lambda what: None


def run(
    case: Case,
    clocks: Sequence[Wall],
    rounds: int,
    *,
    warmup: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
    ceilings: dict[str, float] | None = None,
    until: float = math.inf,
) -> list[Row]:
    """Rows of the case, in the order of its arms. A failed arm's row holds no number.

    The first clock's times are the row's; those of others stand under their names. ``strict``: an
    arm that is not available counts as failed, not as skipped. ``ceilings``: of the device, for the
    floor beside each time. ``until``: after three rounds none begins behind that reading of
    ``time.perf_counter``.
    """
    progress = progress or Progress()
    progress.start(case.title, len(case.arms) * (1 + rounds))
    rows = {arm.key: case.row(arm) for arm in case.arms}
    truths: dict[Any, Truth] = {}
    calls: dict[Key, Call] = {}
    with torch.set_grad_enabled(case.direction == "backward"):
        for arm in case.arms:
            progress.step(f"check {arm.key}")
            row = rows[arm.key]
            try:
                measure = arm.key[1:]
                if measure not in truths:
                    truths[measure] = case.truth(arm.key)
                call = arm.build()
                _judge(case, row, call(), truths[measure])
                for _ in range(warmup):
                    call()
                row["detail"] = arm.detail()
            except Unavailable as reason:
                row.update(status="failed" if strict else "skipped", reason=str(reason))
            except Exception as error:
                row.update(status="failed", reason=first_line(error))
            if row["status"] == "ok":
                calls[arm.key] = call
            else:
                for _ in range(rounds):  # its turns will not come
                    progress.step(str(row["status"]))
        for clock in clocks:
            timed = {key: _prepared(clock, call, rows[key]) for key, call in calls.items()}
            first = clock is clocks[0]
            advance = (lambda: progress.step("timing")) if first else (lambda: None)
            turns = max(1, rounds // clock.share)
            samples, outputs = clock.interleave(
                timed, turns, advance, case.settles, until, rest=case.rest
            )
            if first:
                for key, out in outputs.items():
                    _judge(case, rows[key], out, truths[key[1:]])
                calls = {key: call for key, call in calls.items() if rows[key]["status"] == "ok"}
            _times(clock, first, {key: (rows[key], samples[key]) for key in calls})
        for key, call in calls.items():
            rows[key]["memory"] = clocks[0].peak_memory(call)
    for arm in case.arms:
        if arm.key in calls:
            _compare(arm, rows, ceilings)
    return list(rows.values())


def first_line(error: Exception) -> str:
    """A reason of one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _prepared(clock: Wall, call: Call, row: Row) -> Call:
    """What the clock times; the call itself where it cannot be captured, which the row notes."""
    try:
        prepared = clock.prepare(call)
        if isinstance(clock, Graph):
            row["captured"] = clock.captures
        return prepared
    except Exception as error:
        row.update(captured=False, reason=f"not captured: {first_line(error)}")
        return call


def _judge(case: Case, row: Row, out: Outputs, measure: Truth) -> None:
    verdict = judge(case.compared(out), measure, factor_of(row["arm"]))
    row["error"] = verdict.error if verdict.error != float("inf") else None
    row["allowed"] = verdict.allowed
    row["relative"] = verdict.relative if verdict.relative != float("inf") else None
    if not verdict.ok:
        row.update(status="failed", reason=verdict.reason)


def _times(clock: Wall, first: bool, timed: dict[Key, tuple[Row, list[float]]]) -> None:
    """Times, and speed-ups over the other arms of the same rounds."""
    for key, (row, seconds) in timed.items():
        over = {
            other.beside(key.placements): ratio(slow, seconds)
            for other, (_, slow) in timed.items()
            if (other.k is None or other.k == key.k) and other.padding == key.padding
        }
        if first:
            row.update(samples=seconds, **quartiles(seconds), speedup=over)
            row["ns_per_token"] = row["median"] / max(row["tokens"], 1) * 1e9
        else:
            row[clock.name] = quartiles(seconds) | {"samples": seconds, "speedup": over}


def _compare(arm: Arm, rows: dict[Key, Row], ceilings: dict[str, float] | None) -> None:
    """A row beside its cost bound, its floor and the reference's memory."""
    row = rows[arm.key]
    dense = next((row["speedup"][name] for name in DENSE if name in row["speedup"]), None)
    row["above_bound"] = bool(dense and row["bound"] and dense["median"] > row["bound"])
    if ceilings and arm.work:
        row["floor"] = sum(phase.seconds(ceilings) for phase in arm.work)
        row["over_floor"] = row["median"] / row["floor"]
    reference = rows.get(Key("reference", *arm.key[1:]), {})
    if row["memory"] and reference.get("memory"):
        row["memory_of_reference"] = row["memory"] / reference["memory"]
