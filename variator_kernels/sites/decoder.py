"""What a patched decoder does beside what its original did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.self_attention import Rotation, Scheme, SelfAttention
from ..ops.transforms import exporting, is_plain, nobody_changes
from ..runtime.context import Context
from ..runtime.kept import Kept
from ..runtime.level import Level
from ..runtime.site import Site
from ..runtime.state import MOST_LEVELS
from .attention import DescribedAttention, paths_of
from .attention_refusals import CACHE, check_no_mask, check_no_weights
from .decoder_refusals import both_ways
from .encoder import Encoder
from .family import lookup
from .mixins import SITE, AtSite

PREFILLED = "variator_prefilled"
"""Attribute of a cache: its last forward was one of several tokens a row."""


def _cache(read: Callable[[str], Any]) -> Any:
    """The cache, by whichever of its names it is given; None: by neither."""
    return next((found for name in CACHE if (found := read(name)) is not None), None)


class Decoder(Encoder):
    """Holds the context ready, as an encoder does. A forward of one token a row is a step of
    decoding, in which FFNs are dense; one of more is a prompt, or a part of it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            and not exporting()
            and self._length(args, kwargs) > 1
            and self._compressed(self.variator_state.current()).schemes
        ):
            return self._outside_the_graph(*args, **kwargs)
        return super().forward(*args, **kwargs)

    @torch.compiler.disable
    def _outside_the_graph(self, *args: Any, **kwargs: Any) -> Any:
        """A prompt whose keys are merged: a graph that breaks at each layer loses the context, and
        with it the mask."""
        return super().forward(*args, **kwargs)

    def _level(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Level:
        level = self.variator_state.current()
        if self._length(args, kwargs) == 1:
            return self._compressed(level).step
        return level

    def _compressed(self, level: Level) -> Compressed:
        """What ``level`` compresses."""
        state = self.variator_state
        kept, sites = state.kept, state.sites
        if torch.compiler.is_compiling():
            return compressed(level, sites, kept)
        key = level, kept.window, kept.first
        found = state.found.get(key)
        if found is None:
            if len(state.found) >= MOST_LEVELS:
                state.found = {}
            found = state.found[key] = compressed(level, sites, kept)
        return found

    def _length(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return self._size(args, kwargs)[1]

    def _size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        """Rows and tokens of each."""
        tokens = self._given("input_ids", args, kwargs)
        if tokens is None:
            tokens = self._given("inputs_embeds", args, kwargs)
        return (0, 0) if tokens is None else (tokens.shape[0], tokens.shape[1])

    def _arranged(
        self, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        level, cut = context.level, self._compressed(context.level)
        if cut.schemes and not any(name in self.variator_positions for name in CACHE):
            raise ValueError(
                f"{type(self).__name__}.forward must take its cache as one of {CACHE} where keys "
                "are merged: this version of transformers calls it otherwise"
            )
        cache = self._given_cache(args, kwargs)
        if "crop" in getattr(cache, "__dict__", ()) and not cache.get_seq_length():
            del cache.crop  # it was emptied since: nothing of a prompt is left in it
        if cache is not None and (cut.schemes or _holds_merged(cache)):
            rows = self._size(args, kwargs)[0]
            _merged_cache().check_cache(cache, cut.schemes, context.mask, rows)
        if level.is_dense:
            return args, kwargs
        context.causal = True
        alone = not context.fuses and self.variator_state.local.observer is None
        context.step = alone and self._length(args, kwargs) == 1 and nobody_changes()
        context.past = 0 if cache is None else int(cache.get_seq_length())
        context.position_ids = self._given("position_ids", args, kwargs)
        if context.position_ids is None and "cache_position" in self.variator_positions:
            place = self._given("cache_position", args, kwargs)
            context.position_ids = None if place is None else place[None]
        self._check(context, cache, args, kwargs)
        if context.past:
            context.keep = context.keep._replace(first=0)  # they are at the cache's beginning
            if getattr(cache, PREFILLED, True) and cut.ffn:
                raise ValueError(
                    "a prompt must come whole where ffn is compressed, whose groups depend on how "
                    "it is cut: no prefill in chunks and no assisted decoding. Got a forward of "
                    f"{self._length(args, kwargs)} tokens right behind another of several: pass "
                    "the prompt at once, or run its parts at a level without ffn"
                )
        if not cut.schemes:
            return args, kwargs
        check_no_weights(self, self._given("output_attentions", args, kwargs))
        mask = self.variator_family.mask
        config: Any = self.config
        if len(cut.schemes) == config.num_hidden_layers:
            # Nobody reads the mask of n x n that would be made: this one is taken as it is.
            args, kwargs = self._with(mask, torch.zeros(1, 1, 1, 1), args, kwargs)
        return args, kwargs

    def _check(
        self, context: Context, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Nothing says what only dense attention would look at."""
        n = self._length(args, kwargs)
        mask, positions = context.mask, context.position_ids
        if mask is not None and mask.shape[1] != context.past + n:
            raise ValueError(
                f"attention_mask must have shape [batch, {context.past + n}], the tokens of "
                f"past_key_values and the new ones, got {list(mask.shape)}"
            )
        if kwargs.get("is_causal") is False:
            raise ValueError("is_causal must not be False where something is compressed")
        if says := both_ways(self.config):
            raise ValueError(
                f"config must be a causal model's where something is compressed, got {says}"
            )
        packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seqlens"))
        if mask is None and cache is None and isinstance(positions, Tensor) and is_plain(positions):
            # transformers takes such rows for several sequences side by side.
            packed |= bool((positions.diff(dim=-1) != 1).any())
        if packed:
            raise ValueError(
                "sequences must not be packed into one row where something is compressed: "
                "position_ids must count on by one, or come with an attention_mask; pass each "
                "sequence as a row"
            )

    def _given_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _cache(lambda name: self._given(name, args, kwargs))

    def _with(
        self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        position = self.variator_positions[name]
        if position < len(args):
            return (*args[:position], value, *args[position + 1 :]), kwargs
        return args, {**kwargs, name: value}

    def _done(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = _cache(lambda name: getattr(output, name, None))
        if cache is None and isinstance(output, tuple):
            cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
        if cache is None:
            cache = self._given_cache(args, kwargs)
        if not hasattr(cache, "layers"):
            return
        n = self._length(args, kwargs)
        setattr(cache, PREFILLED, n > 1)
        if n > 1 and self._compressed(self.variator_state.current()).ffn:
            cache.crop = _refuse_crop  # the rest of a group has seen what would be taken back


_loaded: Any = None


def _merged_cache() -> Any:
    """Not imported before it is needed: it imports transformers."""
    global _loaded
    if _loaded is None:
        from . import merged_cache

        _loaded = merged_cache
    return _loaded


def _holds_merged(cache: Any) -> bool:
    kind = _merged_cache().MergedLayer
    return any(isinstance(layer, kind) for layer in getattr(cache, "layers", ()))


def _refuse_crop(*_: Any) -> None:
    raise ValueError(
        "past_key_values cannot be cropped once ffn was compressed in a prompt, whose groups have "
        "seen what would be taken back: no assisted decoding with ffn"
    )


class Compressed(NamedTuple):
    """What a level compresses."""

    ffn: bool
    schemes: dict[int, Scheme]
    """Of the layers whose keys are merged."""
    step: Level
    """The one of a step of decoding: every FFN is dense."""


def compressed(level: Level, sites: tuple[Site, ...], kept: Kept) -> Compressed:
    """What ``level`` compresses, where so many tokens stay whole."""
    pairs = list(zip(sites, level.ratios, strict=True))
    ffn = any(k > 1 and site.placement == "ffn" for site, k in pairs)
    schemes = {
        site.layer: Scheme(k, kept.window, kept.first)
        for site, k in pairs
        if k > 1 and site.placement != "ffn"
    }
    step = Level(tuple(1 if site.placement == "ffn" else k for site, k in pairs)) if ffn else level
    return Compressed(ffn, schemes, step)


class CausalAttentionLayer(AtSite):
    """A decoder's self-attention: as it was where its ratio is 1, else over merged keys."""

    variator_described: DescribedAttention
    layer_idx: int

    def self_attention(self) -> SelfAttention:
        """What the sublayer consists of now."""
        return self.variator_described.of(self)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if SITE not in vars(self):
            return super().forward(hidden_states, *args, **kwargs)
        ratio = self._ratio_for(hidden_states)
        if ratio == 1:
            return super().forward(hidden_states, *args, **kwargs)
        return self._compressed(hidden_states, ratio, *args, **kwargs)

    @torch.compiler.disable
    def _compressed(self, hidden_states: Tensor, ratio: int, *args: Any, **kwargs: Any) -> Any:
        """Not compiled: what a cache holds decides what runs. The other parts of a step are."""
        state, context = self.variator_state, self._context()
        if state.local.context is None:
            check_no_mask(args, kwargs)
        turned = kwargs.get("position_embeddings")
        if turned is None:
            turned = args[0]  # where it is not given by name, it comes first
        scheme = Scheme(ratio, state.kept.window, state.kept.first)
        given = _cache(kwargs.get)
        store = None
        if given is not None:
            store = _merged_cache().merged_layer(given, self.layer_idx, scheme)
        turns = paths_of(self).turns
        rotation = None
        if not turns or lookup(self, turns):
            rotation = Rotation(turned[0], turned[1])
        run = state.method.causal_attention
        return run(self, hidden_states, scheme, context, rotation, store), None
