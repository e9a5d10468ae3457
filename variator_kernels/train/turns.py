"""Which levels a run trains, and which of them a step."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..runtime.level import Level
from ..runtime.state import State
from .config import DistillationConfig
from .evaluation import DENSE, name_of

MIXED = "mixed"
"""The name, beside ratios, of a level that differs between sites."""


class Turns:
    """The trained levels by name: ``levels`` if there are any, as ``set_ratio`` takes them; else
    every ratio at all placements that have it with ``sample_ratios``, else the model's active
    level.

    Raises:
        ValueError: a level is dense, or not the model's, or the levels cannot share steps as
        ``args`` asks for.
    """

    def __init__(
        self, state: State, args: DistillationConfig, levels: Mapping[str, Any] | None = None
    ) -> None:
        if levels is None and not args.sample_ratios and state.level.is_dense:
            raise ValueError(
                f"model's ratio must be one of {state.ratios} at some site, got 1 (dense): "
                "set_ratio()"
            )
        self.levels: dict[int | str, Level]
        if levels is not None:
            names = [name_of(name) for name in levels]
            if not names or DENSE in names or len(set(names)) < len(names):
                raise ValueError(
                    f"levels must have different names other than {DENSE!r}, got {list(levels)}"
                )
            self.levels = {name: state.check(level) for name, level in levels.items()}
            for name, level in self.levels.items():
                if level.is_dense:
                    raise ValueError(
                        f"level {name} must have a ratio above 1 at some site, all are dense"
                    )
        elif args.sample_ratios:
            self.levels = {k: state.everywhere(k) for k in state.ratios}
        else:
            self.levels = {state.ratio or MIXED: state.level}
        self.names = tuple(self.levels)
        self.sites = state.sites
        self.seed = args.seed
        self.shared = args.ratios_per_step
        if len(self.names) % self.shared:
            raise ValueError(
                f"ratios_per_step must divide the number of ratios, got {self.shared} for "
                f"{self.names}"
            )
        if args.world_size > 1 and 1 < self.shared < len(self.names):
            # DDP looks for unused parameters once a forward, and finds the other forward's.
            raise ValueError(
                "ratios_per_step must be 1 or the number of ratios in several processes, got "
                f"{self.shared} for {self.names}"
            )

    @property
    def take_turns(self) -> bool:
        """Whether a step leaves some of the levels out."""
        return len(self.names) > self.shared

    def of_placement(self, placement: str) -> list[Level]:
        """The levels with all other placements dense."""
        return [
            Level(
                tuple(
                    k if site.placement == placement else 1
                    for site, k in zip(self.sites, level.ratios, strict=True)
                )
            )
            for level in self.levels.values()
        ]

    def at(self, step: int) -> list[int | str]:
        """What that step trains: in random order, all of them before any comes again."""
        turn, position = divmod(step * self.shared, len(self.names))
        order = random.Random(f"{self.seed} {turn}").sample(self.names, len(self.names))
        return order[position : position + self.shared]


def scale_rate(optimizer: Any, parameters: Iterable[Tensor], factor: float) -> None:
    """Give some parameters ``factor`` times their learning rate, in groups of their own."""
    chosen = set(parameters)
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if p in chosen]
        group["params"] = [p for p in group["params"] if p not in chosen]
        if own:
            optimizer.add_param_group({**group, "params": own, "lr": factor * group["lr"]})
