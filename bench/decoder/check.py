"""No number without it: each level against float64, and its cache against the specification."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import variator_kernels as vk

from .. import internals
from ..cases import models
from ..harness import checks
from ..harness.checks import Verdict
from ..harness.results import Row
from ..harness.runner import first_line
from . import setup
from .levels import Level

STEPS = 9
"""Tokens that the check decodes one by one: whole groups of the ratios measured, and one more."""
ROWS = 5
PACKED_FACTOR = 3.0
"""How far from float64 a level may be in fp32, in plain PyTorch's errors. oneDNN's packed products
sum all terms of an inner dimension in one chain, MKL's (``F.linear``) in blocks: alone 1.7 to 2.2
times the error, root mean square, of 576 to 3072 terms. Twice leaves the rest of a model nothing.
"""


def verdicts(dense: Any, levels: Iterable[Level], ratios: list[int]) -> list[Row]:
    """For each level whether its numbers may be shown, and if not, why."""
    check, found = Check(dense, ratios), []
    for level in levels:
        try:
            found.append(check(level).row())
        except Exception as error:
            found.append({"status": "failed", "reason": first_line(error)})
    return found


class Check:
    """Each level on short prompts: against the reference in float64, and what its cache holds.

    The plugins are others than those that are measured: no parameter is 0.
    """

    def __init__(self, dense: Any, ratios: Iterable[int]) -> None:
        self.dense, self.ratios = dense, tuple(ratios)
        self.double = models.sharing(dense, "eager").double()
        self.twins: dict[int | None, tuple[Any, Any]] = {}

    @torch.no_grad()
    def __call__(self, level: Level) -> Verdict:
        """The verdict; ``ValueError`` where the cache holds something else than specified."""
        length = (level.window or 0) + 8 * max(self.ratios) + STEPS
        ids = models.tokens(ROWS, length, self.dense.config.vocab_size)
        if not level.where:
            plain = _hidden(models.sharing(self.dense, "eager"), ids)
            found = _hidden(self.dense, ids)
            return judge(found, _hidden(self.double, ids), plain, checks.BASELINE_FACTOR)
        if level.window not in self.twins:
            pairs = ((self.dense, "auto"), (self.double, "reference"))
            ours, double = (self._twin(model, level.window or 0, name) for model, name in pairs)
            self.twins[level.window] = ours, double
        for model in self.twins[level.window]:
            vk.set_ratio(model, level.ratio(model.config.num_hidden_layers))
        ours, double = self.twins[level.window]
        with internals.using_backend(ours, "reference"):
            plain = _hidden(ours, ids)
        factor = PACKED_FACTOR if self.dense.dtype == torch.float32 else checks.FACTOR
        return judge(_hidden(ours, ids, level), _hidden(double, ids), plain, factor)

    def _twin(self, dense: Any, window: int, backend: str) -> Any:
        twin, source = setup.patched(dense, self.ratios, window, backend), models.generator(5)
        for parameter in vk.plugin_parameters(twin):
            value = torch.randn(parameter.shape, generator=source) * 0.02
            parameter.copy_(value.to(self.dense.dtype))
        return twin


def judge(found: Tensor, exact: Tensor, plain: Tensor, factor: float) -> Verdict:
    """The rule of ``harness.checks`` for ``[rows, tokens, d]`` on the tokens' median, and at eight
    times for the place (of a token in its row) that is worst in most rows.

    A pretrained decoder has a few tokens that enlarge any rounding by orders of magnitude, at other
    places in each row: the largest error is luck. What is wrong is wrong at one place in all rows.
    """
    if found.shape != exact.shape or not bool(found.isfinite().all()):
        return Verdict(False, math.inf, 0.0)
    ours, theirs = ((rows.double() - exact).abs().amax(-1) for rows in (found, plain))
    made = []
    for of, times in ((_of_tokens, factor), (_of_places, checks.BASELINE_FACTOR)):
        error, allowed = of(ours), times * of(theirs) + checks.SLACK
        made.append(Verdict(error <= allowed, error, allowed))
    return next((verdict for verdict in made if not verdict.ok), made[0])


def _of_tokens(errors: Tensor) -> float:
    return errors.median().item()


def _of_places(errors: Tensor) -> float:
    return errors.median(0).values.max().item()


def _hidden(model: Any, ids: Tensor, level: Level | None = None) -> Tensor:
    """Last hidden states of all tokens: of a prompt, then of ``STEPS`` single ones."""
    parts, cache, begin = [], None, 0
    for end in range(ids.shape[1] - STEPS, ids.shape[1] + 1):
        now = ids[:, begin:end]
        out = model.base_model(input_ids=now, past_key_values=cache, use_cache=True)
        parts.append(out.last_hidden_state)
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
