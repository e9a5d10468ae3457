"""What the patched modules of one model share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import backends
from ..ops.groups import NOTHING_KEPT, Groups, Keep
from ..ops.transforms import exporting, tracing
from . import level as levels
from .context import Context, check_kept
from .kept import Kept, are_among
from .level import Level
from .plan import Plan
from .site import Site

STATE = "variator_state"
"""The attribute under which every patched module refers to its model's :class:`State`."""
MOST_LEVELS = 64
"""That are kept resolved."""
Observer = Callable[[nn.Module, Tensor, "Tensor | None", int], None]


class Method(Protocol):
    """What a method has to offer to be put at the sites of a model."""

    name: str
    config: Any
    """What was chosen when the model was patched."""

    @property
    def placements(self) -> Mapping[str, tuple[int, ...]]:
        """The placements that it works at, and the ratios that it has parameters for at each."""
        ...

    def feed_forward(
        self, layer: Any, x: Tensor, ratio: int, context: Context, dense: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The output of a feed-forward site for ``x [B, n, d]``, at a ratio above 1."""
        ...

    def attention(
        self, layer: Any, x: Tensor, ratio: int, context: Context, rotation: Any
    ) -> Tensor:
        """The output of a self-attention site, at a ratio above 1. ``rotation``: of whole queries,
        in a model with RoPE."""
        ...

    def causal_attention(
        self, layer: Any, h: Tensor, scheme: Any, context: Context, rotation: Any, store: Any
    ) -> Tensor:
        """The output of a decoder's self-attention site; ``store``: what its cache holds, or
        None."""
        ...

    def is_trained(self, layer: Any, ratio: int) -> bool:
        """Whether the parameters at a site are others than those it starts with."""
        ...


class _Local(threading.local):
    # Set here and not as class attributes: the compiler guards on the instance's own dict.
    def __init__(self) -> None:
        self.override: Level | None = None
        self.kept: Tensor | None = None
        self.context: Context | None = None
        self.observer: Observer | None = None
        self.observed = "ffn"
        """The placement whose sublayers the observer sees."""
        self.inline = 0
        """Of a block that calls the parts of its FFN one after another: see ``sites/inline.py``."""


_OWN = ("local", "_levels", "found")
"""Of a state's attributes: no copy takes them over."""


class State:
    """Shared by all patched modules of one model; a deep copy of the model gets its own.

    ``level`` is what :func:`~.levels.set_ratio` chose, ``kept`` what stays whole in every forward.
    ``local.context`` is that of the forward now running in this thread; ``local.override`` and
    ``local.kept`` mirror :func:`~.levels.use_ratio` and :func:`~.keep.keep` for compiled code,
    which cannot read a ``ContextVar``.
    """

    def __init__(
        self,
        family: str,
        method: Method,
        sites: tuple[Site, ...],
        owners: tuple[int, ...],
        layers: int = 0,
    ) -> None:
        """``owners``: for each site the first that is the same module; ``layers``: how many the
        encoder has, 0 where nobody counted."""
        self.family = family
        self.method = method
        self.sites = sites
        self.owners = owners
        self.layers = layers
        self.level = Level((1,) * len(sites))
        self.kept = Kept()
        self.warned = False
        """Nobody is to be told that plugins are untrained."""
        self._forget()
        self._begin()

    def _forget(self) -> None:
        """Nothing is known of the plugins' values."""
        self.fitted: set[tuple[int, int]] = set()
        """Sites, by number, and ratios whose plugins calibration fitted or a file calls trained:
        they may have the values that they start with."""
        self.quiet: set[tuple[int, int]] = set()
        """Those of which there is nothing (more) to say in this process."""
        self.looked_at: Level | None = None
        """The last level of which nothing was left to say."""

    def _begin(self) -> None:
        """What no copy takes over."""
        self.local = _Local()
        self._levels: dict[Any, tuple[Any, Level]] = {}
        self.found: dict[Any, Any] = {}
        """What sites found out about levels, by what it depends on."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: value for k, value in vars(self).items() if k not in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        if "fitted" not in state:  # of an older version, which said something once a model
            state = {"layers": 0} | state | {"warned": False}
            state.pop("trained", None)
        vars(self).update(state)
        self._begin()

    @property
    def ratios(self) -> tuple[int, ...]:
        """Every ratio that has plugins at some site."""
        every = {k for ratios in self.method.placements.values() for k in ratios}
        return tuple(sorted(every))

    @property
    def own_sites(self) -> list[tuple[int, Site]]:
        """Every site of a module of its own, with its number: a shared one is there once."""
        return [(i, self.sites[i]) for i, owner in enumerate(self.owners) if i == owner]

    def plugins_of(self, level: Level) -> set[tuple[int, int]]:
        """Those that run there: the number of a module's first site, and the ratio."""
        return {(own, k) for own, k in zip(self.owners, level.ratios, strict=True) if k > 1}

    def attends(self, level: Level) -> bool:
        """Whether some attention is compressed there."""
        pairs = zip(self.sites, level.ratios, strict=True)
        return any(k > 1 and site.placement != "ffn" for site, k in pairs)

    def everywhere(self, ratio: int) -> Level:
        """Every placement that has plugins of ``ratio`` at it, the others dense."""
        placements = self.method.placements
        return Level(tuple(ratio if ratio in placements[s.placement] else 1 for s in self.sites))

    @property
    def ratio(self) -> int | None:
        """The one that :func:`~.levels.set_ratio` chose for all sites; None if they differ."""
        return self.level.uniform

    def check(self, ratio: object) -> Level:
        """The level that ``ratio`` asks for, if this model has its plugins."""
        if type(ratio) is not int and not isinstance(ratio, Plan):
            return levels.resolve(ratio, self.sites, self.method.placements, self.owners)
        # Numbers and plans cannot change, nor do sites and placements: resolved once.
        key = ratio if type(ratio) is int else ("plan", id(ratio))
        known = self._levels.get(key)
        if known is None:
            level = levels.resolve(ratio, self.sites, self.method.placements, self.owners)
            if len(self._levels) >= MOST_LEVELS:
                self._levels = {}
            known = self._levels[key] = ratio, level  # holds the plan, so its id is no other's
        return known[1]

    def current(self) -> Level:
        """The level that holds here: :func:`~.levels.use_ratio`'s, else ``set_ratio``'s."""
        if torch.compiler.is_compiling():
            override = self.local.override
        else:
            override = overrides.get().get(self)
        return self.level if override is None else override

    def context(
        self, level: Level, mask: Tensor | None = None, input_ids: Tensor | None = None
    ) -> Context:
        """That of a forward which begins here, over tokens of a checked ``mask``.

        Raises:
            ValueError: token ids stay whole and ``input_ids`` is None, at a ratio above 1.
        """
        return Context(mask, level, keep=NOTHING_KEPT if level.is_dense else self._keep(input_ids))

    def groups(self, x: Tensor, ratio: int) -> Groups:
        """For an :data:`Observer`: listed, of ``x [B, n, d]`` in the forward that runs here."""
        assert self.local.context is not None
        # Around tokens of a mask the CPU's kernels list what is there, the reference what may be.
        backend = "cpu" if backends.resolve("auto", x) == "cpu" else "reference"
        return self.local.context.groups(x, ratio, backend)

    def _keep(self, input_ids: Tensor | None) -> Keep:
        kept, mask = self.kept, self.local.kept
        if not torch.compiler.is_compiling():
            mask = kept_masks.get().get(self)
        if mask is not None and (exporting() or tracing()):
            raise ValueError(
                "vk.keep's mask does not go into an exported or traced program, which would hold "
                "it for every input: leave the block, and patch with keep_first, keep_last or keep"
            )
        if kept.ids:
            if input_ids is None:
                raise ValueError(
                    f"keep={kept.ids} needs the encoder's input_ids at a ratio above 1, got none: "
                    "with inputs_embeds, or for a sublayer by itself, patch without keep and name "
                    "the tokens by vk.keep(model, mask)"
                )
            found = are_among(input_ids, kept.ids)
            if mask is not None:
                check_kept(mask, found)
                found = found | mask.to(found.device)
            mask = found
        return Keep(kept.first, kept.last, mask)


overrides: ContextVar[Mapping[State, Level]] = ContextVar(
    "variator_levels",
    default=MappingProxyType({}),
)
kept_masks: ContextVar[Mapping[State, Tensor]] = ContextVar(
    "variator_kept_masks",
    default=MappingProxyType({}),
)
"""What :func:`~.keep.keep` keeps whole here."""


def states(model: nn.Module) -> list[State]:
    """The states of every patched model inside ``model``.

    Raises:
        TypeError: ``model`` is not a module. ValueError: nothing in it is patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = dict.fromkeys(vars(m)[STATE] for m in model.modules() if STATE in vars(m))
    if not found:
        raise ValueError("model is not patched: call variator_kernels.patch(model) first")
    return list(found)


@contextmanager
def observe(state: State, observer: Observer, placement: str = "ffn") -> Iterator[None]:
    """Show ``observer`` what each patched sublayer of a placement takes, in this thread.

    It gets the sublayer, its input ``[B, n, d]``, the token mask and the ratio, before the
    sublayer runs.
    """
    local = state.local
    outer = local.observer, local.observed
    local.observer, local.observed = observer, placement
    try:
        yield
    finally:
        local.observer, local.observed = outer
