"""What of a method is measured: cost, memory, and time beside all others; each checked first."""

import copy
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import variator_kernels as vk

from .. import internals
from ..harness import allocations
from ..harness.checks import QUANTISED
from ..harness.clock import Wall, quartiles, ratio
from ..harness.results import Row
from ..harness.runner import first_line
from .registry import Method, served
from .tasks import Task, parameters

TOLERANCE = 1e-3
"""Of logits, as a part of their largest: in fp32 against float64, and of a row alone."""
EXACT = 1e-9
"""The same in float64, of a method that must change nothing."""


def checked(method: Method, task: Task, trained: Any, model: Any) -> str:
    """Why the numbers of the served ``model`` may not be shown, or nothing.

    At its neutral setting a method gives the original's logits in float64. Served it gives those
    of ``trained``, the same in float64 and not served yet, and of each row alone those of the row
    in its batch.
    """
    try:
        batch = task.inputs[len(task.inputs) // 2]
        if method.neutral is not None:
            twin = method.neutral(task.fresh().double(), task).eval()
            apart = distance(task.logits(twin, batch), task.logits(task.fresh().double(), batch))
            if apart > EXACT:
                return f"where it must change nothing, logits are off by {apart:.2g}"
        found = task.logits(model, batch)
        trained = vk.merge(trained) if internals.is_projected(trained) else trained
        with _reference(method, trained):
            exact = task.logits(trained.double().eval(), batch)
        apart, allowed = distance(found, exact), QUANTISED if method.precision else TOLERANCE
        if apart > allowed:
            return f"served logits are off by {apart:.2g} of float64's, allowed {allowed:.2g}"
        for row in range(0, len(found), max(1, len(found) // 4)):
            alone = task.logits(model, _alone(batch, row))
            if (apart := distance(alone, found[row : row + 1])) > allowed:
                return f"row {row} alone is off by {apart:.2g} of itself in its batch"
    except Exception as error:
        return first_line(error)
    return ""


@contextmanager
def _reference(method: Method, model: Any) -> Iterator[None]:
    """Plain PyTorch in the model's own dtype, of plugins too."""
    plugged = method.ratio != 1
    with internals.own_precision():
        with internals.using_backend(model, "reference") if plugged else nullcontext():
            yield


def distance(found: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest value; infinite for another shape or NaN."""
    if found.shape != exact.shape or not bool(found.isfinite().all() and exact.isfinite().all()):
        return math.inf
    apart = float((found.double() - exact.double()).abs().max())
    largest = float(exact.double().abs().max())
    return apart / largest if largest else (math.inf if apart else 0.0)


def _alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[row].sum()
    return {name: values[row : row + 1, : int(real)] for name, values in batch.items()}


def memory(model: Any, call: Callable[[], Tensor]) -> Row:
    """Bytes: of the weights, packed copies with them, and of what a forward of the longest batch
    allocates through torch at its peak."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
                for p in model.parameters()}  # fmt: skip
    call()
    peak = allocations.profiled(lambda: (call(),)).peak
    weights = sum(storages.values()) + internals.packed_bytes(model)
    return {"weights_bytes": weights, "peak_bytes": peak}


def costs(methods: list[Method], task: Task, make: Callable[[Method], Any], rounds: int,
          say: Callable[[str], None]) -> list[Row]:  # fmt: skip
    """A row a method. ``make`` gives its trained model, as it is before it is served."""
    dense, whole = task.multiply_adds(task.model, 1), parameters(task.model)
    rows: dict[str, Row] = {}
    models: dict[str, Any] = {}
    for method in methods:
        say(f"check {method.label}")
        row: Row = {"method": method.name, "setting": method.setting, "status": "ok"}
        trained = make(method)
        added = parameters(trained) / whole - 1
        model = served(method, copy.deepcopy(trained))
        row["reason"] = checked(method, task, trained, model)
        rows[method.label] = row
        if row["reason"]:
            row["status"] = "failed"
            continue
        row |= {"added": added, "multiply_adds": task.multiply_adds(model, method.ratio) / dense}
        longest = max(task.inputs, key=lambda batch: batch["input_ids"].shape[1])
        row |= memory(model, partial(task.logits, model, longest))
        models[method.label] = model
        del trained, model
        gc.collect()
    say("timing")
    calls = {label: partial(task.run, model) for label, model in models.items()}
    for call in calls.values():
        call()
    seconds, _ = Wall().interleave(calls, rounds)
    first = methods[0].label
    for label, own in seconds.items():
        rows[label] |= {"seconds": quartiles(own), "samples": own}
        if first in seconds:
            rows[label]["speedup"] = ratio(seconds[first], own)
    if first not in seconds:
        for label in seconds:
            rows[label] |= {"status": "failed", "reason": "nothing to compare with"}
    return list(rows.values())
