"""What a plan chooses among, and what a choice is predicted to cost and to lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..runtime.level import Level
from ..runtime.plan import ROUNDING
from ..runtime.state import State

Choice = tuple[int, ...]
"""For each module of its own the number of one of :attr:`Options.every`."""


class Options:
    """Every ratio of every module, dense ones too. A shared module has one for all its uses."""

    def __init__(self, state: State) -> None:
        self.owners = state.owners
        own = state.own_sites
        self.modules = [number for number, _ in own]
        self.layers = [
            [
                site.layer
                for site, owner in zip(state.sites, state.owners, strict=True)
                if owner == n
            ]
            for n in self.modules
        ]
        """Those in which each module runs."""
        self.every = [
            (module, k)
            for module, (_, site) in enumerate(own)
            for k in (1, *state.method.placements[site.placement])
        ]
        self.dense = self.uniform(1)

    def uniform(self, ratio: int) -> Choice:
        """This ratio wherever there is one."""
        number = {option: i for i, option in enumerate(self.every)}
        return tuple(number.get((m, ratio), number[m, 1]) for m in range(len(self.modules)))

    def alone(self, option: int) -> Choice:
        """All other modules dense."""
        module, _ = self.every[option]
        return (*self.dense[:module], option, *self.dense[module + 1 :])

    def least(self, values: np.ndarray) -> Choice:
        """The option of each module with the least of ``values [options]``."""
        own: dict[int, list[int]] = {}
        for i, (module, _) in enumerate(self.every):
            own.setdefault(module, []).append(i)
        return tuple(min(found, key=values.__getitem__) for found in own.values())

    def level(self, choice: Choice) -> Level:
        """The ratios of all sites."""
        ratios = {
            number: self.every[option][1]
            for number, option in zip(self.modules, choice, strict=True)
        }
        return Level(tuple(ratios[owner] for owner in self.owners))


class Goal(NamedTuple):
    """The bounds of a choice. Where the loss has one the cost is made small, else the loss."""

    cost: float = math.inf
    loss: float = math.inf

    def fits(self, cost: float, loss: float) -> bool:
        """``loss`` must be finite, whatever its bound."""
        return cost <= self.cost * (1 + ROUNDING) and loss <= self.loss and loss < math.inf

    def key(self, cost: Any, loss: Any) -> tuple[Any, Any]:
        """What is smaller is better."""
        return (loss, cost) if self.loss == math.inf else (cost, loss)

    def order(self, cost: float, loss: Callable[[], float]) -> tuple[float, float]:
        """The same with all that does not fit behind what does; ``loss`` is asked for where the
        cost fits."""
        if self.fits(cost, 0) and self.fits(cost, loss()):
            return self.key(cost, loss())
        return math.inf, math.inf


class Predictions:
    """What choices cost and lose, from the options taken singly.

    Costs add up. The errors of the last hidden state that single options make are taken to add up
    as vectors, so the loss of a choice is the sum of their scalar products.

    Args:
        options: the choices.
        costs: ``[options]``, what each alone adds to the dense cost, which is 1.
        products: ``[options, options]``, scalar products of their errors, over the dense model's
            square; infinite where an option alone makes no finite output.
    """

    def __init__(self, options: Options, costs: np.ndarray, products: np.ndarray) -> None:
        self.options, self.costs = options, costs
        self.usable = np.isfinite(products.diagonal())
        self.products = np.where(self.usable[:, None] & self.usable, products, 0.0)
        self.module = np.array([module for module, _ in options.every])

    def cost(self, choice: Choice) -> float:
        return 1 + float(self.costs[list(choice)].sum())

    def loss(self, choice: Choice) -> float:
        if not self.usable[list(choice)].all():
            return math.inf
        return max(float(self.products[np.ix_(choice, choice)].sum()), 0.0)

    @property
    def cheapest(self) -> Choice:
        """The least cost that there is."""
        return self.options.least(np.where(self.usable, self.costs, math.inf))

    def path(self) -> list[Choice]:
        """From dense down to the cheapest, each step the one that adds least loss for what it
        saves."""
        choice = self.options.dense
        found = [choice]
        while True:
            saved, added = (values.diagonal() for values in self._changes(choice))
            open_ = self.usable & (saved < 0)
            if not open_.any():
                return found
            rate = np.where(open_, added / np.where(open_, -saved, 1), math.inf)
            choice = self._with(choice, int(rate.argmin()))
            found.append(choice)

    def descend(self, choice: Choice, goal: Goal, scale: float = 1.0) -> Choice:
        """Better predicted choices, one after another, until no move finds one."""
        while True:
            here = goal.key(self.cost(choice), scale * self.loss(choice))
            step = next(self.moves(choice, goal, scale), None)
            if step is None:
                return choice
            there = goal.key(self.cost(step), scale * self.loss(step))
            if there[0] >= here[0] - 1e-9 * abs(here[0]):
                return choice
            choice = step

    def moves(self, choice: Choice, goal: Goal, scale: float = 1.0) -> Iterator[Choice]:
        """Choices of one or two other options that are predicted to fit, the best first.

        ``scale``: times the predicted loss.
        """
        more, worse = self._changes(choice)
        cost = self.cost(choice) + more
        loss = scale * np.maximum(self.loss(choice) + worse, 0)
        # Two options of one module exclude each other; each with itself is a move of one.
        apart = self.module[:, None] != self.module
        possible = np.triu(apart | np.eye(len(apart), dtype=bool))
        other = self.usable.copy()
        other[list(choice)] = False
        possible &= other[:, None] & other
        possible &= (cost <= goal.cost * (1 + 1e-9)) & (loss <= goal.loss)
        rows, columns = possible.nonzero()
        first, second = goal.key(cost[rows, columns], loss[rows, columns])
        for i in np.lexsort((second, first)):
            yield self._with(self._with(choice, int(rows[i])), int(columns[i]))

    def _changes(self, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
        """What a pair of other options changes of cost and loss, ``[options, options]``; on the
        diagonal, one option."""
        old = np.array(choice)[self.module]
        cost = self.costs - self.costs[old]
        g = self.products
        apart = g - g[:, old] - g[old] + g[old][:, old]  # products of changes
        behind = g[:, list(choice)].sum(1)
        loss = apart.diagonal() + 2 * (behind - behind[old])
        costs, losses = cost[:, None] + cost, loss[:, None] + loss + 2 * apart
        np.fill_diagonal(costs, cost)
        np.fill_diagonal(losses, loss)
        return costs, losses

    def _with(self, choice: Choice, option: int) -> Choice:
        module = self.module[option]
        return (*choice[:module], option, *choice[module + 1 :])
