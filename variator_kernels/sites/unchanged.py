"""Refusing an encoder that somebody changed, or whose family says what is not there."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.feed_forward import FeedForward, normalize, products
from .attention_refusals import check_without
from .families import known
from .family import Family, follow, lookup
from .feed_forward import describe
from .find import replaced, whole_rows
from .found import Found, full_name
from .loading import ATTACHED
from .reach import reach


def check_unchanged(found: Found, placements: tuple[str, ...] = ("ffn",)) -> None:
    """Every class is exactly the family's, every ``forward`` its own, no layer cuts its rows, and
    the name of plugins is free.

    Raises:
        ValueError: somebody replaced one; the message says which.
    """
    family = found.family
    module = module_of(family)
    norms = [lookup(layer, family.norm) for layer in found.layers] if family.norm else []
    parts = found.parts(placements) + [(norm, family.norm_class) for norm in norms]
    for part, name in parts:
        changed = replaced(part)
        kind: Any = getattr(module, name, None) or getattr(nn, name, None)
        if not isinstance(kind, type):
            raise ValueError(
                f"family.module {family.module!r} has no class {name!r} to be imported"
            )
        if type(part) is not kind:
            raise ValueError(f"model must have a plain {name}, got {full_name(type(part))}")
        home: Any = next(base for base in kind.__mro__ if "forward" in vars(base))
        if changed or inspect.unwrap(home.forward).__module__ != home.__module__:
            raise ValueError(
                f"the forward of {name} was replaced; patch the model before other tools do, or "
                "undo theirs first"
            )
    arguments = inspect.signature(found.encoder.forward).parameters
    if family.mask not in arguments:
        raise ValueError(
            f"the forward of {family.encoder} has no argument {family.mask!r} (family.mask), which "
            f"tells padding: it has {list(arguments)}"
        )
    sublayers = list(found.layers)
    for layer in sublayers:
        whole_rows(layer)
    if set(placements) - {"ffn"}:
        sublayers += found.attentions
    for layer in sublayers:
        if hasattr(layer, ATTACHED):
            raise ValueError(
                f"model's {type(layer).__name__} must not have {ATTACHED!r}, the name that plugins "
                f"take, got {type(getattr(layer, ATTACHED)).__name__}: rename or remove it"
            )


def check_attention(found: Found) -> None:
    """The family says where self-attention is, and that is what the placements compute.

    Raises:
        ValueError: it does not, or the model has something else there.
    """
    family = found.family
    paths = family.attention
    if paths is None:
        why = family.no_attention or "its family has no attention=vk.AttentionPaths(...)"
        raise ValueError(
            f"placements must be ('ffn',) for {family.name}: {why}; got one around attention"
        )
    expected = f"{family.module}.{paths.layer}"
    for number, block in enumerate(found.blocks):
        try:
            layer = follow(block, paths.sublayer)
            got = full_name(type(layer))
            if got != expected:
                raise ValueError(
                    f"placements must be ('ffn',) where a {family.name}'s attention is a {got}: "
                    f"family.attention says {expected} (another version of transformers may have "
                    'it, or attn_implementation="eager")'
                )
            reach(found.encoder, block, number, paths)
            for name in ("q", "k", "v", "qkv", "o", "head_size", "norm", "table_of", "window"):
                follow(layer, getattr(paths, name))
            for name in ("q_norm", "k_norm", "sliding", "turns", "q_bias", "v_bias"):
                follow(layer, getattr(paths, name))
            if not known(family):
                follow(layer, paths.scaling)  # of the table's, older transformers had none
            if paths.distances is not None:
                follow(layer, paths.distances.kinds)
                follow(layer, paths.distances.used)
            if paths.global_keys is not None:
                follow(layer, paths.global_keys.size)
                follow(layer, paths.global_keys.norm)
        except (AttributeError, IndexError, TypeError, KeyError) as error:
            raise ValueError(
                f"model's block {number} lacks what family.attention says of {family.name} "
                f"(another version of transformers may have it): {error}"
            ) from error
        inner = follow(layer, paths.inner)
        if paths.inner and type(inner).__name__ != paths.inner_class:
            raise ValueError(
                f"placements must be ('ffn',) where a {family.name}'s attention is a "
                f"{type(inner).__name__}: family.attention says {paths.inner_class}"
            )
        check_without(family.name, layer, (*paths.mixes, *paths.absent))
        check_without(family.name, found.encoder, paths.encoder_absent)
        if any(hasattr(module, "distance_embedding") for module in layer.modules()):
            raise ValueError(
                f"placements must be ('ffn',) for a {family.name} whose position_embedding_type is "
                "relative: its terms depend on the content"
            )


def module_of(family: Family) -> Any:
    """The module that defines the family's classes.

    Raises:
        ValueError: it cannot be imported; a family of ``transformers`` may be newer.
    """
    try:
        return importlib.import_module(family.module)
    except ImportError as error:
        text = f"family {family.name!r} needs {family.module}, which cannot be imported: {error}"
        if family.module.startswith("transformers."):
            version = importlib.import_module("transformers").__version__
            text += f"; transformers {version} is installed, another version may have it"
        raise ValueError(text) from error


@torch.no_grad()
def check_described(found: Found) -> None:
    """A family of somebody's own describes what the sublayers compute, on small random inputs.

    Where a block calls the FFN's modules itself, only these are compared.

    Raises:
        ValueError: it does not; or a sublayer does not take ``[batch, length, hidden]``.
    """
    family = found.family
    for position, layer in found.own_layers:
        like = found.like(position)
        if like.is_meta:
            return
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 5, found.hidden_size, generator=generator).to(like)
        modes = [(module, module.training) for module in layer.modules()]
        try:
            for module, _ in modes:
                module.training = False
            got, expected = _described(layer, x, family), _dense(layer, x, family)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"family {family.name!r} does not fit {type(layer).__name__} of block {position}, "
                f"which fails on hidden states {list(x.shape)}: {error}"
            ) from error
        finally:
            for module, training in modes:
                module.training = training
        if not isinstance(expected, Tensor) or expected.shape != x.shape:
            what = list(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
            raise ValueError(
                f"family.layer {family.layer!r} must give hidden states {list(x.shape)}, got {what}"
            )
        off = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
        if not off <= (1e-3 if x.dtype.itemsize >= 4 else 5e-2):
            raise ValueError(
                f"family {family.name!r} does not describe what {type(layer).__name__} of block "
                f"{position} computes: on random input it is off by {off:.2g} of the output's "
                "norm. Compare with its forward: w_in (goes through act), w_gate or the order in "
                "fused; norm, norm_kind, post_norm and residual; steps and called"
            )


def _described(layer: nn.Module, x: Tensor, family: Family) -> Tensor:
    ffn: FeedForward = describe(layer, family)
    norm = (ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)
    o = products(x if ffn.post_norm or family.called else normalize(x, *norm), ffn)
    if family.called:
        return o
    y = x + o if ffn.residual else o
    return normalize(y, *norm) if ffn.post_norm else y


def _dense(layer: nn.Module, x: Tensor, family: Family) -> Any:
    if family.called:
        for step in family.steps:
            x = follow(layer, step)(x)
        return x
    return layer(x) if family.layer != family.block else getattr(layer, family.method)(x)
