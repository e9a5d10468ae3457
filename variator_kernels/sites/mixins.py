"""What patched blocks and sublayers do beside what their originals did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.arguments import Norm
from ..ops.fast_norm import normalize_fast, rms_of_few
from ..ops.feed_forward import FeedForward
from ..ops.transforms import is_plain
from ..runtime.context import Context
from ..runtime.site import Site
from ..runtime.state import State
from . import dense as fused
from .described import Described
from .find import whole_rows
from .inline import Inline

SITE = "variator_site"
"""The attribute under which a patched sublayer has its :class:`SitePosition`."""
DESCRIBED = "variator_described"
"""The attribute under which it keeps its :class:`~.described.Described`."""


class SitePosition(NamedTuple):
    """Which site a sublayer is, and where a level has its ratio."""

    site: Site
    number: int


class Block(nn.Module):
    """Carries the context through gradient checkpointing.

    The recompute runs in backward, where the encoder's forward and ``use_ratio`` may be over: so
    the context travels with the call that is checkpointed, as one more keyword argument.
    """

    variator_state: State
    gradient_checkpointing = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            state = self.variator_state
            kwargs["variator_context"] = state.local.context or state.context(state.current())
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, variator_context: Context | None = None, **kwargs: Any) -> Any:
        if variator_context is None:
            return super().forward(*args, **kwargs)
        local = self.variator_state.local
        outer = local.context
        local.context = variator_context
        try:
            return super().forward(*args, **kwargs)
        finally:
            local.context = outer


FEW = 32
"""So few vectors are normed as fast as they were, unless it takes a single call."""


class BlockNorm(nn.Module):
    """A norm between sublayers: as it was where all of them are dense, else in fewer passes."""

    variator_state: State
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        context = self.variator_state.local.context
        if context is None or context.dense:
            return super().forward(hidden_states)
        if context.step and hidden_states.numel() <= FEW * hidden_states.shape[-1]:
            weight = self._parameters.get("weight")
            if weight is not None:
                y = rms_of_few(hidden_states, weight, self.variance_epsilon)
                if y is not None:
                    return y
        if not is_plain(hidden_states):
            return super().forward(hidden_states)
        few = hidden_states.numel() <= FEW * hidden_states.shape[-1]
        if few or hidden_states.dtype == torch.float64:  # which is rounded to fp32 inside
            return super().forward(hidden_states)
        return normalize_fast(hidden_states, Norm("rms", self.weight, None, self.variance_epsilon))


class AtSite(nn.Module):
    """A sublayer at which there is a site."""

    variator_state: State
    variator_site: SitePosition

    def _context(self) -> Context:
        state = self.variator_state
        context = state.local.context
        if context is None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "a patched FFN is recomputed outside its encoder, without mask and ratio: "
                    "checkpoint with model.gradient_checkpointing_enable(), or the whole encoder"
                )
            context = state.context(state.current())
        return context

    def ratio_here(self) -> int:
        """The ratio that holds here; 1 where there is no site (a block that is patched for its
        attention alone)."""
        if SITE not in vars(self):
            return 1
        return self._context().level.ratios[self.variator_site.number]

    def _ratio_for(self, x: Tensor) -> int:
        """The ratio that holds here, shown to the observer, for an input that it can run on."""
        state, context = self.variator_state, self._context()
        if SITE not in vars(self):
            return 1
        site, number = self.variator_site
        ratio = context.level.ratios[number]
        if state.local.observer is not None and state.local.observed == site.placement:
            packed = context.packed_of(x)
            shown = x if packed is None else packed.pad(x)
            state.local.observer(self, shown, context.mask_of(shown), ratio)
        if ratio > 1 and x.dim() != 3 and context.packed_of(x) is None:
            raise ValueError(
                f"hidden states must be [batch, length, hidden] at a ratio above 1, or the tokens "
                f"[tokens, hidden] of an attention_mask that the encoder got, got {list(x.shape)}"
            )
        return ratio


class Sublayer(AtSite):
    """The FFN sublayer: as it was where its ratio is 1, else what the method makes of it."""

    variator_described: Described[FeedForward]

    def feed_forward(self) -> FeedForward:
        """What the sublayer consists of now."""
        return self.variator_described.of(self)

    def _at_site(self, x: Tensor, dense: Callable[[Tensor], Tensor]) -> Tensor:
        if SITE not in vars(self) and DESCRIBED not in vars(self):
            return dense(x)
        local = self.variator_state.local
        if local.context is not None and local.context.step:
            return dense(x)
        ratio = self._ratio_for(x)
        if ratio == 1:
            y = fused.feed_forward(self, self.variator_described, x, self._context())
            return dense(x) if y is None else y
        whole_rows(self)
        state, context = self.variator_state, self._context()
        packed = context.packed_of(x)
        if packed is None:
            return state.method.feed_forward(self, x, ratio, context, dense)
        return packed.unpad(
            state.method.feed_forward(self, packed.pad(x), ratio, context, dense), x
        )


class Layer(Sublayer):
    """A module that is the FFN sublayer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self._at_site(hidden_states, super().forward)


class BlockWithMethod(Block, Sublayer):
    """A block that has the FFN sublayer as a method."""


class BlockInline(Block, Inline, Sublayer):
    """A block whose ``forward`` calls the parts of its FFN."""
