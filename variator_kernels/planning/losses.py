"""Measured losses: of levels; of each option alone, with the scalar products of their errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..methods.variator.calibration.search import Errors
from ..methods.variator.calibration.streams import Store
from .options import Choice, Options

SAMPLE = 2**26
"""Values of all errors together that are kept for their products: 256 MiB."""


class Losses:
    """Relative squared errors of the last hidden state, each measured once."""

    def __init__(self, errors: Errors, options: Options, step: Callable[[], object]) -> None:
        """``step`` is called behind each measurement."""
        self.errors, self.options, self.step = errors, options, step
        self.known: dict[Choice, float] = {options.dense: 0.0}

    def of(self, choice: Choice) -> float:
        if choice not in self.known:
            self.known[choice] = self.errors.of(self.options.level(choice))
            self.step()
        return self.known[choice]


def sample(lengths: list[int], size: int) -> list[Tensor]:
    """``size`` of all tokens, or all there are, each as likely as any other: their places in each
    batch of ``lengths`` tokens, in order. The same at each call."""
    chosen = torch.zeros(sum(lengths), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    chosen[torch.randperm(len(chosen), generator=generator)[:size]] = True
    return [part.nonzero().flatten() for part in chosen.split(lengths)]


class Singles:
    """Of every option alone: its loss, and its error at some of the tokens.

    Errors at a sample of tokens give the angles between them, those at all tokens their lengths.
    """

    def __init__(self, losses: Losses) -> None:
        self.losses, options, errors = losses, losses.options, losses.errors
        size = max(1, SAMPLE // (len(options.every) * errors.dense[0].shape[-1]))
        self.kept = sample([len(x) for x in errors.dense], size)
        self.found: dict[int, Tensor] = {}

    def measure(self, option: int, stream: Store | None) -> None:
        """``stream`` has what the dense model has in front of the option's first block."""
        errors, options = self.losses.errors, self.losses.options
        choice = options.alone(option)
        squared, kept = 0.0, []
        begin = min(options.layers[options.every[option][0]])
        found = errors.differences(options.level(choice), begin, stream)
        for x, places in zip(found, self.kept, strict=True):
            squared += float(x.double().square().sum())
            kept.append(x[places.to(x.device)].cpu().flatten())
        self.losses.known[choice] = errors.relative(squared)
        self.found[option] = torch.cat(kept)
        self.losses.step()

    def products(self) -> np.ndarray:
        """``[options, options]``, over the dense model's square."""
        count = len(self.losses.options.every)
        made = np.zeros((count, count))
        alone = (self.losses.options.alone(option) for option in self.found)
        lengths = np.sqrt([self.losses.known[choice] for choice in alone])
        every = torch.nn.functional.normalize(torch.stack(list(self.found.values())), dim=1)
        angles = np.nan_to_num((every @ every.T).double().numpy())
        np.fill_diagonal(angles, 1.0)
        with np.errstate(invalid="ignore"):  # an infinite error at a right angle
            inner = angles * lengths[:, None] * lengths
        made[np.ix_(list(self.found), list(self.found))] = inner
        return made
