"""Merged keys inside of a ``transformers`` cache: a layer of it, of our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..ops.self_attention import Book, MergedKeys, Scheme
from ..runtime.context import check_past


class MergedLayer(MergedKeys, CacheLayerMixin):
    """The keys and values of a layer whose ``attention_kv`` is compressed.

    It takes the place of an empty layer in the cache that a model is given or makes. Beams,
    batches and ``crop`` work on it as on the others; only a compressed layer can write to it.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, scheme: Scheme) -> None:
        CacheLayerMixin.__init__(self)
        self.scheme = scheme
        self.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.scheme})"

    def reset(self) -> None:
        """Empty again."""
        self.book = Book.empty(0, torch.device("cpu"))
        self.entries = self.recent = None  # type: ignore[assignment]

    @property
    def is_initialized(self) -> bool:
        return self.entries is not None

    @is_initialized.setter
    def is_initialized(self, _: bool) -> None:
        pass  # what the base class would remember

    @property
    def keys(self) -> Any:
        """Refused: there are no keys of tokens to copy, as a cache of others would."""
        raise ValueError(
            "a cache of merged keys has no keys and values of tokens: copy it whole (copy.deepcopy)"
        )

    @keys.setter
    def keys(self, _: Any) -> None:
        pass  # what the base class begins with

    values = keys

    def lazy_initialization(self, *_: Any) -> None:
        """Nothing: the first forward makes what there is."""

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise ValueError(
            f"past_key_values holds merged keys, of k={self.scheme.ratio}, for a layer that is not "
            "compressed now: use the ratio that the cache was filled at, or another cache"
        )

    def get_seq_length(self, *_: Any) -> int:
        return self.book.columns

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        new = query.shape[0] if isinstance(query, Tensor) else query
        return self.book.columns + new, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens: int) -> None:
        """Take the last ``-tokens`` back; a positive number is what shall be left, as older
        versions of transformers have it.

        Raises:
            ValueError: later queries would need what is gone by now.
        """
        if self.is_initialized:
            columns = -tokens if tokens < 0 else self.book.columns - tokens if tokens > 0 else 0
            if columns == self.book.columns:
                self.reset()
            elif columns > 0:
                self.book = self.book.cropped(columns, self.scheme)

    def offload(self) -> None:
        raise NotImplementedError("merged keys cannot be offloaded: make the cache without it")

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        index = indices.to(self.entries.device)
        self.entries, self.recent = self.entries[index], self.recent[index]
        self.book = self.book.of_rows(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(len(self.entries), device=self.entries.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


def check_cache(cache: Any, schemes: Mapping[int, Scheme], mask: Tensor | None, rows: int) -> None:
    """A model's cache can take a forward of ``rows`` in which these layers are compressed: asked
    before anything of it changes.

    Raises:
        ValueError: it cannot.
    """
    if not hasattr(cache, "get_seq_length"):
        raise ValueError(f"past_key_values must be a Cache, got a {type(cache).__name__}")
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if isinstance(layer, MergedLayer) and number not in schemes:
            if layer.book.columns:
                layer.update()  # which says why not
            cache.layers[number] = DynamicLayer()
    seen = None
    for number, scheme in schemes.items():
        layer = merged_layer(cache, number, scheme)
        if layer.book is not seen:  # layers of one scheme mostly share it
            seen = layer.book
            book = layer.before(rows, torch.device("cpu"))
            check_past(mask, book.shown, book.columns)


def merged_layer(cache: Any, number: int, scheme: Scheme) -> MergedLayer:
    """Layer ``number`` of a model's cache, empty or filled under ``scheme``.

    Raises:
        ValueError: it is a cache of another kind, or was filled otherwise.
    """
    layers = getattr(cache, "layers", None)
    if layers is not None and number < len(layers):
        layer = layers[number]
        if type(layer) is MergedLayer and layer.scheme == scheme:
            layer.leave_inference()
            return layer
    own = getattr(type(cache), "update", None) is not Cache.update
    if layers is None or own or getattr(cache, "offloading", False):
        raise ValueError(
            "past_key_values must be a DynamicCache without offloading where attention is "
            f"compressed, got {type(cache).__name__}"
            + (" with offloading" if layers is not None else "")
        )
    kind = getattr(cache, "layer_class_to_replicate", None)
    while len(layers) <= number:
        layers.append((kind or DynamicLayer)())
    layer = layers[number]
    if isinstance(layer, MergedLayer):
        if layer.book.columns:
            raise ValueError(
                f"past_key_values was filled at {layer.scheme}, the model runs at {scheme}: use "
                "the same, or another cache"
            )
    elif type(layer) is not DynamicLayer:
        raise ValueError(
            f"past_key_values must be a DynamicCache where attention is compressed, got a "
            f"{type(cache).__name__} of {type(layer).__name__}: leave it to the model, which makes "
            "one"
        )
    elif layer.get_seq_length():
        raise ValueError(
            "past_key_values holds plain keys of a layer that is compressed now: use "
            "set_ratio(model, 1), or another cache"
        )
    layers[number] = made = MergedLayer(scheme)
    return made
