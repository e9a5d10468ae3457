"""Which sizes a model gets for a share of its parameters, and which its configuration accepts."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from ... import checks
from ...sites.residual import FFN, HIDDEN, Layout

GRAINS = (64, 32, 16, 8, 4, 2, 1)
"""Sizes are multiples of the first of these that serves; kernels like the first best."""
NEAR = 0.02
"""How far below the share that is asked for the sizes' own may lie,"""
EVEN = 0.3
"""and how far apart the widths' own shares (their logarithms), before a finer grain is tried."""
WAYS = 4
"""To divide a share: a finer grain where there are fewer,"""
UNEVEN = math.log(4)
"""and how far apart the widths' own shares are at most."""


class Sizes(NamedTuple):
    hidden: int
    ffn: int


def sizes_of(model: Any, layout: Layout) -> Sizes:
    config = model.config
    return Sizes(getattr(config, layout.hidden_field), getattr(config, layout.ffn_field))


def narrowed(model: Any, layout: Layout, sizes: Sizes) -> Any:
    """The configuration of ``model`` at other sizes, its heads as they are.

    Raises:
        ValueError: the configuration's class refuses them.
    """
    config = copy.deepcopy(model.config)
    row, hidden = layout.residual, getattr(config, layout.hidden_field)
    says = row is None or row.head_size != "head_dim" or getattr(config, "head_dim", None)
    if hidden != sizes.hidden and not says:
        config.head_dim = hidden // config.num_attention_heads
    setattr(config, layout.hidden_field, sizes.hidden)
    setattr(config, layout.ffn_field, sizes.ffn)
    try:
        # What is saved must load: as the class reads it, not as attributes were set.
        type(config).from_dict(config.to_dict())
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ValueError(reason[-1].strip() if reason else type(error).__name__) from error
    return config


def parameters(model: nn.Module, layout: Layout, sizes: Sizes, untied: bool = False) -> int:
    """How many parameters the model has at these sizes; those that are shared count once."""
    width = {HIDDEN: sizes.hidden, FFN: sizes.ffn}
    total, seen = 0, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        apart = untied and name == f"{layout.head}.weight"
        if id(parameter) in seen and not apart:
            continue
        if not apart:
            seen.add(id(parameter))
        roles = layout.roles.get(name, ("",) * parameter.dim())
        shape = (width.get(role, n) for role, n in zip(roles, parameter.shape, strict=True))
        total += math.prod(shape)
    return total


def chosen(
    model: Any,
    layout: Layout,
    share: float | None,
    hidden: int | None,
    ffn: int | None,
    untied: bool = False,
) -> Sizes:
    """What ``params``, or ``hidden`` and ``ffn``, ask for.

    Raises:
        ValueError: both or neither are given, one is out of range, the family keeps its hidden
        size, or the configuration's class refuses a size.
    """
    own = sizes_of(model, layout)
    if (share is None) == (hidden is None and ffn is None):
        raise ValueError(
            "either params, a share of the parameters, or hidden and ffn, sizes, must be given, "
            f"got params={share!r}, hidden={hidden!r}, ffn={ffn!r}"
        )
    accepts = functools.cache(lambda size: _refusal(model, layout, size, own.ffn) is None)
    if share is not None:
        return _for_share(model, layout, _share(share), accepts, untied)
    wanted = Sizes(
        own.hidden if hidden is None else checks.integer(hidden, "hidden", 1, own.hidden),
        own.ffn if ffn is None else checks.integer(ffn, "ffn", 1, own.ffn),
    )
    if wanted.hidden != own.hidden and layout.residual is None:
        raise ValueError(
            f"hidden must be {own.hidden} for a model of type {layout.family!r}, whose FFN width "
            f"alone can be reduced ({layout.fixed}), got {wanted.hidden}"
        )
    if (reason := _refusal(model, layout, *wanted)) is not None:
        near = _nearest(wanted.hidden, own.hidden, accepts)
        raise ValueError(
            f"hidden must be a size that {type(model.config).__name__} accepts, such as {near}, "
            f"got {wanted.hidden}: {reason}"
        )
    return wanted


def splits(model: Any, layout: Layout, share: float, untied: bool, most: int) -> list[Sizes]:
    """Sizes of nearly that share, divided between both widths in different ways: at most so many,
    the widest stream first. None where a head of its own leaves no room."""
    own = sizes_of(model, layout)
    whole = parameters(model, layout, own)
    accepts = functools.cache(lambda size: _refusal(model, layout, size, own.ffn) is None)
    found: list[Sizes] = []
    for grain in GRAINS:
        some = []
        for hidden, most_ffn in _candidates(model, layout, share * whole, grain, accepts, untied):
            for fine in GRAINS:
                sizes = Sizes(hidden, min(own.ffn, max(1, most_ffn // fine * fine)))
                left = parameters(model, layout, sizes, untied) / whole
                if share - NEAR <= left <= share:
                    some.append(sizes)
                    break
        # A head of its own serves a stream that gets narrower.
        some = [s for s in some if _uneven(s, own) <= UNEVEN and not (untied and s[0] == own[0])]
        found = max(found, some, key=len)
        if len(found) >= WAYS:
            break
    found.sort(reverse=True)
    step = max(1.0, len(found) / most)
    return [found[int(i * step)] for i in range(min(most, len(found)))]


def _share(value: Any) -> float:
    """``params``; ``ValueError`` for what is no share."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"params must be a share in (0, 1], got {value!r}")
    return float(value)


def _refusal(model: Any, layout: Layout, hidden: int, ffn: int) -> str | None:
    try:
        narrowed(model, layout, Sizes(hidden, ffn))
    except ValueError as error:
        return str(error)
    return None


def _nearest(size: int, most: int, accepts: Callable[[int], bool]) -> str:
    """The nearest sizes on either side."""
    below = next((n for n in range(size - 1, 0, -1) if accepts(n)), None)
    above = next((n for n in range(size + 1, most + 1) if accepts(n)), None)
    return " or ".join(str(n) for n in (below, above) if n is not None) or "the original's"


def _for_share(
    model: Any, layout: Layout, share: float, accepts: Callable[[int], bool], untied: bool
) -> Sizes:
    """The sizes of at most that share. Both widths shrink alike where grains allow it."""
    own = sizes_of(model, layout)
    whole = parameters(model, layout, own)
    if share == 1.0 and not untied:
        return own
    best: tuple[float, Sizes] | None = None
    for grain in GRAINS:
        for hidden, most in _candidates(model, layout, share * whole, grain, accepts, untied):
            ffn = own.ffn if most >= own.ffn else _down(most, min(64, own.ffn))
            if ffn < 1:
                continue
            sizes = Sizes(hidden, ffn)
            missed = share - parameters(model, layout, sizes, untied) / whole - NEAR
            uneven = 0.0 if layout.residual is None else _uneven(sizes, own)
            badness = max(0.0, missed) / NEAR + max(0.0, uneven - EVEN) / EVEN
            # Below both bounds the more even one.
            score = badness if badness > 0 else uneven / EVEN - 1
            if best is None or score < best[0]:
                best = score, sizes
        if best is not None and best[0] <= 0:
            break
    if best is None:
        least = Sizes(next(n for n in range(1, own.hidden + 1) if accepts(n)), 1)
        if layout.residual is None:
            least = Sizes(own.hidden, 1)
        floor = parameters(model, layout, least, untied) / whole
        raise ValueError(
            f"params must be at least {floor:.3g} for this model, what cannot be reduced has that "
            f"share, got {share}"
        )
    return best[1]


def _uneven(sizes: Sizes, own: Sizes) -> float:
    narrow = [math.log(n / o) for n, o in zip(sizes, own, strict=True)]
    return abs(narrow[0] - narrow[1])


def _candidates(
    model: Any,
    layout: Layout,
    budget: float,
    grain: int,
    accepts: Callable[[int], bool],
    untied: bool,
) -> Iterator[tuple[int, int]]:
    """For every hidden size, in multiples, the largest FFN width that the budget has room for."""
    own = sizes_of(model, layout)
    steps = range(grain, own.hidden, grain)
    hiddens = [n for n in (*steps, own.hidden) if accepts(n)]
    for hidden in hiddens if layout.residual is not None else [own.hidden]:
        # Linear in the FFN's width.
        one, two = (parameters(model, layout, Sizes(hidden, n), untied) for n in (1, 2))
        yield hidden, int(1 + (budget - one) // (two - one))


def _down(size: int, grain: int) -> int:
    """The multiple of a grain below; of a finer one where that would lose much."""
    while grain > 1 and size % grain > 0.1 * size:
        grain //= 2
    return size // grain * grain
