"""The self-attention sublayer of a patched model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.self_attention import Rotation, SelfAttention
from . import dense
from .attention import DescribedAttention, paths_of
from .attention_refusals import check_no_mask
from .family import follow
from .mixins import AtSite
from .reach import reach_of


class AttentionLayer(AtSite):
    """The self-attention sublayer: as it was where its ratio is 1, else what the method makes."""

    variator_described: DescribedAttention
    variator_bare: bool
    """Whether ``forward`` gives a tensor alone."""
    variator_turned: int
    """Where among the arguments behind the hidden states cosines and sines are."""

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
        rotation, context = self._rotation(args, kwargs), self._context()
        packed = context.packed_of(hidden_states)
        if packed is None:
            y = state.method.attention(self, hidden_states, ratio, context, rotation)
            return self._given(y, kwargs)
        if rotation is not None:
            rotation = rotation._replace(cos=packed.pad(rotation.cos), sin=packed.pad(rotation.sin))
        y = state.method.attention(self, packed.pad(hidden_states), ratio, context, rotation)
        return self._given(packed.unpad(y, hidden_states), kwargs)

    def _dense(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """In few passes; None: as it was."""
        context = self.variator_state.local.context
        if context is None or not context.fuses or self._forward_pre_hooks:
            return None  # a hook may have put another mask in the place of the encoder's
        described = self.variator_described
        return dense.attention(self, described, x, context, self._rotation(args, kwargs))

    def _rotation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rotation | None:
        paths, place = paths_of(self), self.variator_turned
        if not (paths.rotary or paths.sines):
            return None
        turned = kwargs.get(paths.turned)
        if turned is None and 0 <= place < len(args):
            turned = args[place]
        return reach_of(self).given_rotation(turned)

    def _given(self, y: Tensor, kwargs: dict[str, Any]) -> Any:
        """As the original gives it."""
        if self.variator_bare:
            return y
        return (y, *(kwargs.get(name) for name in paths_of(self).returns))

    def _lend(self) -> None:
        """The tables that this layer makes a bias of in the place of the first one are those that
        are there now."""
        paths = paths_of(self)
        inner = follow(self, paths.table_of) if paths.table_of else None
        if inner is None:
            return
        own = vars(inner)
        if own.keys() & reach_of(self).lent.keys():
            reach_of(self).check_lent(inner)
        for name, table in reach_of(self).lent.items():
            if name in own and own[name] is not table:
                own[name] = table
