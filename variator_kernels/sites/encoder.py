"""What a patched encoder does beside what its original did: the context of a forward."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.transforms import graphing, tracing
from ..runtime.context import Context, is_token_mask, token_mask
from ..runtime.level import Level
from ..runtime.packed import Packed, check_one_sequence, packed_sequences
from ..runtime.state import State
from .attention_refusals import UNREAD, check_absent, check_no_weights, check_without
from .family import Family, blocks_of, follow
from .find import replaced
from .loading import check_loaded
from .mixins import SITE

PACKED = "cu_seq_lens_q"
"""The argument by which packed sequences come (the one of transformers' flash attention)."""


class Encoder(nn.Module):
    """Holds the context ready for the sublayers, which ``transformers`` never passes the mask."""

    variator_state: State
    variator_family: Family
    variator_positions: dict[str, int]
    """Of arguments of ``forward``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state, positions, family = (
            self.variator_state,
            self.variator_positions,
            self.variator_family,
        )
        local, level = state.local, self._level(args, kwargs)
        mask = ids = tokens = packed = None
        fuses = self._fuses(args, kwargs)
        if fuses or not level.is_dense or local.observer is not None:
            mask = token_mask(argument(family.mask, positions, args, kwargs))
            ids = argument("input_ids", positions, args, kwargs)
            tokens = argument("inputs_embeds", positions, args, kwargs) if ids is None else ids
            if mask is None and family.pads:
                mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            if not family.decoder:  # which refuse them by themselves
                packed = packed_sequences(kwargs.get(PACKED), tokens, mask)
                if packed is None and mask is None:
                    places = argument("position_ids", positions, args, kwargs)
                    check_one_sequence(places, attention_of(self))
        context = state.context(level, mask if packed is None else packed.mask, ids)
        context.pads, context.appends = bool(family.pads), family.appends
        context.fuses = fuses
        args, kwargs = self._arranged(context, args, kwargs)
        if packed is not None:
            _pack(context, packed, tokens)
        if not (self.training or state.warned or torch.compiler.is_compiling() or tracing()):
            _warn_if_untrained(self, level)
        outer = local.context
        local.context = context
        try:
            output = super().forward(*args, **kwargs)
        finally:
            local.context = outer
        self._done(output, args, kwargs)
        return output

    def _fuses(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether dense sublayers of this forward are what they seem: nobody looks on, and masks
        are of tokens."""
        state = self.variator_state
        if state.method.config.optimize != "encoder" or self.training:
            return False
        if (torch.compiler.is_compiling() and not graphing()) or tracing():
            return False
        if state.local.observer is not None:
            return False
        if nn.modules.module._has_any_global_hook():  # on every module, those passed by too
            return False
        if state.method.config.backend not in ("auto", "cpu") or self.variator_family.pads:
            return False
        config: Any = getattr(self, "config", None)
        if getattr(config, "_attn_implementation", None) not in ("eager", "sdpa"):
            return False
        asked = self._given("output_attentions", args, kwargs)
        if getattr(config, "output_attentions", False) if asked is None else asked:
            return False
        unread = (self._given(name, args, kwargs) for name in UNREAD)
        if any(given is not None for given in (kwargs.get(PACKED), *unread)):
            return False
        mask = self._given(self.variator_family.mask, args, kwargs)
        return is_token_mask(mask) and self._hands_masks_on()

    def _hands_masks_on(self) -> bool:
        """Whether nobody can put another mask in the place of the encoder's on its way to a layer:
        neither a hook nor somebody else's ``forward``."""
        family = self.variator_family
        path = family.blocks.split(".")
        way = [follow(self, ".".join(path[: i + 1])) for i in range(len(path))]
        way += [*way[-1], *blocks_of(self, family)]
        return not any(part._forward_pre_hooks or replaced(part) for part in way)

    def _level(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Level:
        """The one that holds in this forward."""
        return self.variator_state.current()

    def _arranged(
        self, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments to go on with, once what they say is in ``context``, or refused."""
        if self.variator_state.attends(context.level):
            family = self.variator_family
            assert family.attention is not None
            check_without(
                family.name, self, ("config.is_decoder", *family.attention.encoder_absent)
            )
            context.position_ids = self._given("position_ids", args, kwargs)
            check_no_weights(self, self._given("output_attentions", args, kwargs))
            for name in UNREAD:
                check_absent(name, self._given(name, args, kwargs))
        return args, kwargs

    def _done(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Something to note behind a forward."""

    def _given(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return argument(name, self.variator_positions, args, kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        check_loaded(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def attention_of(encoder: Any) -> str:
    """The name of the attention that ``transformers`` runs; empty where there is none."""
    return str(getattr(getattr(encoder, "config", None), "_attn_implementation", ""))


def _pack(context: Context, packed: Packed, tokens: Tensor | None) -> None:
    """What is known of packed tokens, as of the padded batch."""
    assert tokens is not None
    context.packed = packed
    if context.keep.mask is not None:
        context.keep = context.keep._replace(mask=packed.pad(context.keep.mask))
    places = context.position_ids
    if places is None:
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
    context.position_ids = packed.pad(places)


def argument(
    name: str, positions: dict[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What a call gave for ``name``, or None."""
    value = kwargs.get(name)
    if value is None and len(args) > positions.get(name, len(args)):
        value = args[positions[name]]
    return value


_UNTRAINED = {
    "ffn": "each group of tokens gets the FFN output of its mean",
    "attention": "each group of tokens gets what its mean attends to",
    "attention_kv": "each group of tokens is seen as its mean",
}
"""What a placement does while its plugins are untrained."""


def _warn_if_untrained(encoder: Encoder, level: Level) -> None:
    """Once for each plugin that runs with its initial values, if nothing says that it should."""
    state = encoder.variator_state
    if level is state.looked_at:
        return
    unknown = state.plugins_of(level) - state.fitted - state.quiet
    if unknown:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return  # no value can be read there
        # Layers may have been taken away, or stand in another encoder under other numbers.
        modules = {
            vars(layer)[SITE][1]: layer for layer in encoder.modules() if SITE in vars(layer)
        }
        initial = {
            (n, k)
            for n, k in unknown
            if n in modules and not state.method.is_trained(modules[n], k)
        }
        state.quiet |= unknown
        if initial:
            _warn_of(state, level, initial)
    state.looked_at = level


def _warn_of(state: State, level: Level, untrained: set[tuple[int, int]]) -> None:
    every: Counter[tuple[str, int]] = Counter()
    initial: dict[tuple[str, int], list[int]] = {}
    for site, own, k in zip(state.sites, state.owners, level.ratios, strict=True):
        every[site.placement, k] += 1
        if (own, k) in untrained:
            initial.setdefault((site.placement, k), []).append(site.layer)
    names = []
    for (placement, k), layers in sorted(initial.items()):
        some = f" in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        whole = len(layers) == every[placement, k]
        names.append(f"{placement} of ratio {k}{'' if whole else some}")
    warnings.warn(
        f"plugins are untrained ({', '.join(names)}): {_UNTRAINED[min(initial)[0]]}. Train them or "
        "load_plugins()",
        UserWarning,
        stacklevel=5,
    )
