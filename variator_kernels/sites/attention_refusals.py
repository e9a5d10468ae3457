"""What compressed attention would pass by, refused where it is given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .family import follow, lookup


def check_no_weights(encoder: Any, asked: Any) -> None:
    """Attention's weights over merged keys are not those that anybody asks for."""
    if asked is None:
        asked = getattr(encoder.config, "output_attentions", None)
    if asked:
        raise ValueError(
            "output_attentions must be off where attention is compressed (its weights are over "
            "merged keys), got True: set_ratio(model, 1), or a level without it"
        )


CACHE = ("past_key_values", "cache")
"""What the argument is called: before transformers 5.24, and since."""
UNREAD = ("head_mask", *CACHE)
"""Arguments of an encoder that change what its attention gives."""


def check_absent(name: str, given: Any) -> None:
    if given is not None:
        raise ValueError(
            f"{name} must be None where attention is compressed, which knows neither masks of "
            f"heads nor keys from elsewhere (prefix tuning), got a {type(given).__name__}: "
            "set_ratio(model, 1), or a level without attention"
        )


def check_without(name: str, owner: Any, paths: tuple[str, ...]) -> None:
    """``owner``, of a model of the family ``name``, has nothing at ``paths``."""
    for path in paths:
        value = lookup(owner, path)
        if value is not None and value is not False:
            raise ValueError(
                f"placements must be ('ffn',) for a {name} whose {path} is {value!r}: "
                "merged keys do not know it"
            )


def check_causal(layer: Any, path: str, decoder: bool) -> None:
    """What ``layer`` says of later tokens is what its family does."""
    given = lookup(layer, path)
    if given is not None and bool(given) is not decoder:
        raise ValueError(
            f"{path.rpartition('.')[2]} must be {decoder} where the attention of "
            f"{'a decoder' if decoder else 'an encoder'} is compressed, got {given!r}"
        )


def check_heads(layer: Any, path: str, width: int, size_path: str) -> None:
    """The heads that ``layer`` counts, of the size at ``size_path``, make up a product's width."""
    given, size = lookup(layer, path), follow(layer, size_path)
    if given is not None and given * size != width:
        name, size_name = path.rpartition(".")[2], size_path.rpartition(".")[2]
        raise ValueError(
            f"{name} times {size_name} must be {width} where attention is compressed, got {given} "
            f"times {size}"
        )


def check_no_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [*args, kwargs.get("attention_mask"), kwargs.get("mask")]
    if any(isinstance(value, Tensor) for value in given):
        raise ValueError(
            "attention_mask must be None where a compressed self-attention runs outside of its "
            "encoder, which alone knows the padding, got a mask: call the encoder, or "
            "set_ratio(model, 1)"
        )
