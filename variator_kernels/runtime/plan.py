"""A plan: a level that was chosen for a cost, with what it was measured to cost and to lose."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import checks, files
from . import plan_file
from .site import Site

ASKED = ("speedup", "cost", "loss")
MEASURES = ("time", "flops")
ROUNDING = 1e-9
"""By which part a cost may be above its limit."""


@dataclass(frozen=True)
class Plan:
    """A ratio for every site of a model, as :func:`plan` chooses them.

    :func:`set_ratio`, :func:`use_ratio`, :func:`patch` and :func:`flops.count` take it as a ratio,
    for models with the same sites. ``str()`` is a table.

    Raises:
        ValueError: a field is not what it must be; the message names it.
    """

    sites: tuple[Site, ...]
    """All those of the model, in its order."""
    ratios: tuple[int, ...]
    """One for each; 1 is dense."""
    asked: str
    """``"speedup"``, ``"cost"`` or ``"loss"``: what was given,"""
    limit: float
    """and its value."""
    measure: str
    """``"time"`` or ``"flops"``: what the cost is counted in."""
    predicted_cost: float
    """Of the encoder, over the dense one's: the sum over sites."""
    cost: float
    """The same, of the whole encoder at this level."""
    loss: float
    """The relative squared error of the last hidden state."""

    def __post_init__(self) -> None:
        if type(self.sites) is not tuple or type(self.ratios) is not tuple:
            raise ValueError("sites and ratios must be tuples")
        if not self.sites or not all(isinstance(site, Site) for site in self.sites):
            raise ValueError(f"sites must be those of a model, got {self.sites!r}")
        if len(set(self.sites)) < len(self.sites):
            raise ValueError(f"sites must hold each site once, got {self.sites}")
        if len(self.ratios) != len(self.sites):
            raise ValueError(
                f"ratios must be one for each of {len(self.sites)} sites, got {len(self.ratios)}"
            )
        for ratio in self.ratios:
            if type(ratio) is not int or ratio < 1:
                raise ValueError(f"ratios must hold integers >= 1, got {ratio!r}")
        checks.choice(self.asked, ASKED, "asked")
        checks.choice(self.measure, MEASURES, "measure")
        for name in ("limit", "predicted_cost", "cost", "loss"):
            value = getattr(self, name)
            if not isinstance(value, float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite float >= 0, got {value!r}")
        both = {s.layer for s in self.sites if s.placement == "attention"} & {
            s.layer for s in self.sites if s.placement == "attention_kv"
        }
        if both:
            raise ValueError(
                "sites must not hold both 'attention' and 'attention_kv' of one layer, got them in "
                f"{sorted(both)}"
            )
        self._check_limit()

    def _check_limit(self) -> None:
        """What was asked for can be asked for, and holds."""
        low, high = {"speedup": (1, math.inf), "cost": (0, 1), "loss": (0, math.inf)}[self.asked]
        if not low <= self.limit <= high or (self.asked == "cost" and self.limit == 0):
            above = "above 0, at most 1" if self.asked == "cost" else ">= 1"
            raise ValueError(f"limit must be {above} for a {self.asked}, got {self.limit}")
        if self.asked == "loss":
            if self.loss > self.limit:
                raise ValueError(f"loss must be at most its limit {self.limit}, got {self.loss}")
            return
        most = 1 / self.limit if self.asked == "speedup" else self.limit
        if self.cost > most * (1 + ROUNDING):
            raise ValueError(
                f"cost must be at most {most:g}, which {self.asked}={self.limit:g} asks for, got "
                f"{self.cost}"
            )

    @property
    def by_placement(self) -> dict[str, dict[int, int]]:
        """The ratios by layers by placements, dense ones too."""
        found: dict[str, dict[int, int]] = {}
        for site, ratio in zip(self.sites, self.ratios, strict=True):
            found.setdefault(site.placement, {})[site.layer] = ratio
        return found

    def check_sites(self, sites: Sequence[Site]) -> None:
        """They are this plan's.

        Raises:
            ValueError: they are not; the message names those that differ.
        """
        if self.sites == tuple(sites):
            return
        missing = [site for site in sites if site not in self.sites]
        foreign = [site for site in self.sites if site not in sites]
        facts = [
            f"{words} {_named(found)}"
            for words, found in (("has no ratio for", missing), ("has ratios for", foreign))
            if found
        ]
        raise ValueError(
            f"ratio must be a plan for the model's own sites, {_named(sites)}, this one "
            f"{' and '.join(facts) or 'has them in another order'}"
        )

    def __str__(self) -> str:
        columns = self.by_placement
        layers = sorted({site.layer for site in self.sites})
        lines = [
            f"{self.asked}={self.limit:g} by {self.measure}: cost {self.cost:.3f} of the dense "
            f"encoder's (predicted {self.predicted_cost:.3f}), loss {self.loss:.4g}",
            "layer  " + "  ".join(columns),
        ]
        for layer in layers:
            cells = (f"{of.get(layer, '-'):>{len(place)}}" for place, of in columns.items())
            lines.append(f"{layer:5d}  " + "  ".join(cells))
        return "\n".join(lines)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of the ratios over the layers; the suffix of ``path`` says which kind.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from .plan_picture import figure_of
        except ImportError as error:
            raise ImportError("Plan.draw needs matplotlib: pip install matplotlib") from error
        figure_of(self).savefig(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a JSON file, at once or not at all."""
        text = plan_file.text_of(vars(self))
        files.replace(Path(path), lambda to: to.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan in a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it holds no plan, or one of a
            newer version.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"path must be a plan's file, there is no file {path}")
        try:
            return cls(**plan_file.fields_of(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"path {path} holds no plan that can be read: {error}") from error


def _named(sites: Sequence[Site]) -> str:
    """Sites in words: ``ffn 0 to 5, attention_kv 1``."""
    layers: dict[str, list[int]] = {}
    for site in sites:
        layers.setdefault(site.placement, []).append(site.layer)
    words = []
    for place, found in layers.items():
        run = found == list(range(found[0], found[0] + len(found)))
        if run and len(found) > 1:
            words.append(f"{place} {found[0]} to {found[-1]}")
        else:
            words.append(f"{place} {', '.join(map(str, found))}")
    return ", ".join(words)
