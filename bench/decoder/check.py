"""No number without it: each level against float64, and its cache against the specification."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import variator_kernels as vk

from .. import internals
from ..cases import models
from ..harness import checks
from ..harness.results import Row
from ..harness.runner import first_line
from . import setup
from .levels import Level

STEPS = 9
"""Tokens that the check decodes one by one: whole groups of the ratios measured, and one more."""


def verdicts(
    dense: Any, levels: Iterable[Level], ratios: list[int], windows: list[int]
) -> list[Row]:
    """For each level whether its numbers may be shown, and if not, why."""
    check, found = Check(dense, ratios, max(windows) + 8 * max(ratios) + STEPS), []
    for level in levels:
        try:
            verdict = check(level)
            row = {"status": "ok" if verdict.ok else "failed", "error": verdict.error}
            row |= {"allowed": verdict.allowed, "reason": "" if verdict.ok else verdict.reason}
        except Exception as error:
            row = {"status": "failed", "reason": first_line(error)}
        found.append(row)
    return found


class Check:
    """Each level on a short prompt: against the reference in float64, and what its cache holds.

    The plugins are others than those that are measured: no parameter is 0.
    """

    def __init__(self, dense: Any, ratios: Iterable[int], length: int) -> None:
        self.dense, self.ratios = dense, tuple(ratios)
        self.ids = models.tokens(1, length, dense.config.vocab_size)
        self.double = models.sharing(dense, "eager").double()
        self.twins: dict[int | None, tuple[Any, Any]] = {}

    @torch.no_grad()
    def __call__(self, level: Level) -> checks.Verdict:
        """The verdict; ``ValueError`` where the cache holds something else than specified."""
        if not level.where:
            plain = self._logits(models.sharing(self.dense, "eager"))
            measure = checks.truth((self._logits(self.double),), (plain,))
            return checks.judge((self._logits(self.dense),), measure, checks.BASELINE_FACTOR)
        if level.window not in self.twins:
            pairs = ((self.dense, "auto"), (self.double, "reference"))
            ours, double = (self._twin(model, level.window or 0, name) for model, name in pairs)
            self.twins[level.window] = ours, double
        for model in self.twins[level.window]:
            vk.set_ratio(model, level.ratio(model.config.num_hidden_layers))
        ours, double = self.twins[level.window]
        with internals.using_backend(ours, "reference"):
            measure = checks.truth((self._logits(double),), (self._logits(ours),))
        return checks.judge((self._logits(ours, level),), measure)

    def _twin(self, dense: Any, window: int, backend: str) -> Any:
        twin, source = setup.patched(dense, self.ratios, window, backend), models.generator(5)
        for parameter in vk.plugin_parameters(twin):
            value = torch.randn(parameter.shape, generator=source) * 0.02
            parameter.copy_(value.to(self.dense.dtype))
        return twin

    def _logits(self, model: Any, level: Level | None = None) -> Tensor:
        """Of all tokens: a prompt's, then those of ``STEPS`` single ones."""
        parts, cache, begin = [], None, 0
        for end in range(self.ids.shape[1] - STEPS, self.ids.shape[1] + 1):
            ids = self.ids[:, begin:end]
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            parts.append(out.logits)
            cache, begin = out.past_key_values, end
            if level and level.window is not None:
                wanted = entries(end, level.k, level.window, internals.kept(model)[0])
                found = set(internals.cache_entries(cache))
                if found != {wanted}:
                    raise ValueError(f"cache: {found} entries behind {end} tokens, not {wanted}")
        return torch.cat(parts, 1)


def entries(tokens: int, k: int, window: int, kept: int) -> int:
    """What a query behind so many tokens finds (and its own key is one of), by specification."""
    s = tokens - 1 - kept
    if s < 0:
        return tokens
    groups = min(max(0, s + 1 - window) // k, s // k)
    return kept + groups + s + 1 - k * groups
