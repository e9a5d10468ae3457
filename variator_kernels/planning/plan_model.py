"""The public function: what is asked for, what is measured, and what comes out of the search."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import checks
from ..methods.variator.calibration.calibrate_model import evaluating, patched_encoder
from ..methods.variator.calibration.inputs import Chunk, whole
from ..methods.variator.calibration.search import Errors
from ..methods.variator.calibration.streams import Blocks, Store
from ..runtime.plan import MEASURES, ROUNDING, Plan
from ..runtime.state import State
from .costs import Costs, MultiplyAdds, Seconds
from .losses import Losses, Singles
from .options import Choice, Goal, Options, Predictions
from .search import search

CORRECTIONS = 4
"""Searches within a cost, each with what was measured of the choice before."""


@torch.inference_mode(False)
@torch.no_grad()
def plan(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    speedup: float | None = None,
    cost: float | None = None,
    loss: float | None = None,
    measure: str = "time",
    progress: bool = False,
) -> Plan:
    """A ratio for every site of a patched model: the least loss at a cost, or the least cost.

    The loss is the relative squared error of the last hidden state against the dense model's, over
    all tokens of ``batches``. Each site at each of its ratios is measured alone; what their errors
    predict together is measured, and corrected by a local search. The plan's measured loss is never
    above that of a uniform ratio (at all placements that have it) that fits the cost. No other
    thread may use the model meanwhile. Temporary files (``TMPDIR``) hold two hidden states of every
    token, memory its last one, and some hundred MiB of errors.

    Args:
        model: patched, of one encoder; its plugins trained or calibrated. Its level, mode and
            parameters stay as they are.
        batches: arguments of the encoder, ``attention_mask`` among them, as :func:`calibrate` takes
            them, read once; on its device, and of the sizes that it will be used with. Some hundred
            sequences that its plugins were not fitted to.
        speedup: the plan takes at most ``1 / speedup`` of the dense encoder's time (of its
            multiply-adds with ``measure="flops"``).
        cost: it takes at most this share of it.
        loss: the cheapest plan whose loss is at most this. Exactly one of the three is given.
        measure: ``"time"``: of this machine; of up to 8 of the batches, from the smallest to the
            largest.
            ``"flops"``: by :func:`flops.count`; then the same call gives the same plan.
        progress: show a bar.

    Returns:
        The plan, which :func:`set_ratio` takes. The model's level is what it was.

    Raises:
        ValueError: not exactly one of the three was given, or it is out of range, or below the
            least cost that ratios reach, which the message names; the model is not patched, has
            several encoders, or no values; or batches do not fit, as in :func:`calibrate`.
            TypeError: ``batches`` does not hold mappings. FloatingPointError: the dense model's
            last hidden state is not finite. OSError: no room for the temporary files.
    """
    asked, limit, goal = _goal(speedup, cost, loss)
    checks.choice(measure, MEASURES, "measure")
    found, state = patched_encoder(model, "plan")
    given = whole(batches, inspect.signature(found.encoder.forward).parameters, found.pads_to)
    blocks = Blocks(model, found, state)
    bar = tqdm(disable=not progress, unit="level")
    with bar, evaluating(model, state), blocks.installed():
        options = Options(state)
        bar.total = sum(k > 1 for _, k in options.every)
        costs: Costs
        if measure == "time":
            costs = Seconds(blocks, given, options)
        else:
            costs = MultiplyAdds(model, state, given, options)
        errors = Errors(blocks, state, dict(enumerate(given)))
        if not math.isfinite(errors.total):
            raise FloatingPointError(
                "the dense model's last hidden state is not finite: look for non-finite weights "
                "and inputs, or use a wider dtype"
            )
        losses = Losses(errors, options, bar.update)
        predictions = _measured(blocks, given, losses, costs, bar)
        bar.total = None
        choice, paid = _best(predictions, losses, costs, goal, state, (asked, limit), measure)
    return Plan(
        state.sites,
        options.level(choice).ratios,
        asked,
        limit,
        measure,
        max(predictions.cost(choice), 0.0),
        paid,
        losses.of(choice),
    )


def _goal(speedup: float | None, cost: float | None, loss: float | None) -> tuple[str, float, Goal]:
    every = {"speedup": speedup, "cost": cost, "loss": loss}
    given = {name: value for name, value in every.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"plan needs exactly one of speedup, cost and loss, got {given or 'none'}")
    ((name, value),) = given.items()
    try:
        if isinstance(value, bool | Tensor):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if name == "speedup":
        if not 1 <= number < math.inf:
            raise ValueError(f"speedup must be a finite number >= 1, got {value!r}")
        return name, number, Goal(cost=1 / number)
    if name == "cost":
        if not 0 < number <= 1:
            raise ValueError(f"cost must be a share of the dense encoder's, 0 to 1, got {value!r}")
        return name, number, Goal(cost=number)
    if not 0 <= number < math.inf:
        raise ValueError(f"loss must be a finite number >= 0, got {value!r}")
    return name, number, Goal(loss=number)


def _measured(
    blocks: Blocks, chunks: list[Chunk], losses: Losses, costs: Costs, bar: tqdm
) -> Predictions:
    """Every option alone, layer by layer, on what the dense model has in front of it."""
    options, singles = losses.options, Singles(losses)
    with _stores() as (before, after):
        for layer in range(blocks.count):
            stream = before if layer else None
            costs.visit(layer, stream)
            for option, (module, k) in enumerate(options.every):
                if k > 1 and min(options.layers[module]) == layer:
                    singles.measure(option, stream)
            if layer + 1 < blocks.count:
                for j, chunk in enumerate(chunks):
                    hidden = before[j] if layer else None
                    after[j] = blocks.run(chunk.inputs, 1, layer, layer + 1, hidden)
                before, after = after, before
    return Predictions(options, costs.options(), singles.products())


@contextmanager
def _stores() -> Iterator[tuple[Store, Store]]:
    first, second = Store(), Store()
    try:
        yield first, second
    finally:
        first.close()
        second.close()


def _best(
    predictions: Predictions,
    losses: Losses,
    costs: Costs,
    goal: Goal,
    state: State,
    asked: tuple[str, float],
    measure: str,
) -> tuple[Choice, float]:
    """The best choice whose measured cost fits, and this cost.

    Where a choice costs more than predicted, the next search has so much less to spend.
    """
    options = predictions.options
    uniform = [options.uniform(k) for k in (1, *state.ratios)]
    known = costs.of([*uniform, predictions.cheapest])
    if goal.cost < min(known.values()) * (1 - ROUNDING):
        _unreachable(min(known.values()), asked, measure)
    within = goal
    for _ in range(CORRECTIONS):
        found = search(predictions, losses, within, uniform)
        if found is None:
            break
        known = costs.of([found]) | known  # one that was measured before keeps its cost
        if known[found] <= goal.cost * (1 + ROUNDING):
            break
        within = within._replace(cost=within.cost * goal.cost / known[found])

    fitting = [c for c, paid in known.items() if goal.fits(paid, 0) and goal.fits(0, losses.of(c))]
    if not fitting:
        finite = [paid for c, paid in known.items() if losses.of(c) < math.inf]
        _unreachable(min(finite), asked, measure)
    best = min(fitting, key=lambda choice: goal.key(known[choice], losses.of(choice)))
    return best, known[best]


def _unreachable(least: float, asked: tuple[str, float], measure: str) -> NoReturn:
    name, limit = asked
    most = math.floor(1000 / least) / 1000
    raise ValueError(
        f"{name}={limit:g} cannot be reached: cost must be at least "
        f"{math.ceil(least * 1e4) / 1e4:.4f} of the dense encoder's (speedup at most {most:.3f}), "
        f"the least that the model's ratios reach by {measure}"
    )
