"""The self-attention sublayer of a patched model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.self_attention import Rotation, SelfAttention
from . import dense
from .attention import DescribedAttention, paths_of, reach_of
from .attention_refusals import check_no_mask
from .family import follow
from .mixins import AtSite


class AttentionLayer(AtSite):
    """The self-attention sublayer: as it was where its ratio is 1, else what the method makes."""

    variator_described: DescribedAttention
    variator_bare: bool
    """Whether ``forward`` gives a tensor alone."""

    def self_attention(self) -> SelfAttention:
        """What the sublayer consists of now."""
        return self.variator_described.of(self)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        ratio = self._ratio_for(hidden_states)
        state = self.variator_state
        if ratio == 1:
            self._lend()
            y = self._dense(hidden_states, args, kwargs)
            if y is None:
                return super().forward(hidden_states, *args, **kwargs)
            return self._given(y, kwargs)
        if state.local.context is None:
            check_no_mask(args, kwargs)
        rotation = self._rotation(args, kwargs)
        y = state.method.attention(self, hidden_states, ratio, self._context(), rotation)
        return self._given(y, kwargs)

    def _dense(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """In few passes; None: as it was."""
        context = self.variator_state.local.context
        if context is None or not context.fuses or self._forward_pre_hooks:
            return None  # a hook may have put another mask in the place of the encoder's
        described = self.variator_described
        return dense.attention(self, described, x, context, self._rotation(args, kwargs))

    def _rotation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rotation | None:
        paths = paths_of(self)
        turned = kwargs.get("position_embeddings") if paths.rotary else None
        if paths.rotary and turned is None:
            turned = args[0]  # where it is not given by name, it comes first
        return Rotation(turned[0], turned[1]) if turned is not None else None

    def _given(self, y: Tensor, kwargs: dict[str, Any]) -> Any:
        """As the original gives it."""
        if self.variator_bare:
            return y
        return (y, *(kwargs.get(name) for name in paths_of(self).returns))

    def _lend(self) -> None:
        """The table that this layer makes a bias of in the place of the first one is the table that
        is there now."""
        paths = paths_of(self)
        name = paths.table.rpartition(".")[2]
        own = vars(follow(self, paths.table_of)) if paths.table_of else {}
        if name in own and own[name] is not reach_of(self).table:
            own[name] = reach_of(self).table
