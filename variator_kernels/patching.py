"""Putting plugins around a model's FFNs, and taking them off again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from . import backends
from .methods.variator.config import PLACEMENTS, configure
from .methods.variator.method import Variator
from .ops import prepack
from .runtime import kept
from .runtime.state import State
from .sites.families import BERT_FAMILIES, FAMILIES, T5_FAMILIES
from .sites.family import Family
from .sites.find import check_unchanged, find, is_patched
from .sites.install import install, remove, sites_of
from .sites.wrappers import check_present, check_unwrapped

Model = TypeVar("Model", bound=nn.Module)


def patch_t5(
    model: Model,
    ratio: Any = None,
    ratios: Iterable[int] = (2, 4, 8),
    bottleneck: int = 64,
    activation: str = "tanh",
    placements: Iterable[str] = ("ffn",),
    backend: str = "auto",
    *,
    keep_first: int | None = None,
    keep_last: int = 0,
    keep: Iterable[int] | None = None,
    pack: bool = True,
) -> Model:
    """Put compression plugins around the encoder FFNs of a T5, mT5 or umT5 model, in place.

    Base parameters keep their names, values and ``requires_grad``: freeze them yourself to train
    plugins alone. The plugins of a sublayer are ``plugins[str(k)]``; ``model.save_pretrained``
    writes them beside the plain model, as :func:`save_plugins` does. Decoders stay dense.

    Args:
        model: holds one encoder of these families, at any depth, or is it.
        ratio: the active one, as :func:`set_ratio` takes it; 1 is dense. It is added to ``ratios``
            if it is not there. By default 4, or the first of ``ratios`` if 4 is not among them.
        ratios: every k that gets plugins, each at least 2.
        bottleneck, activation: r and φ of the plugins.
        placements: only ``("ffn",)``.
        backend: as in :func:`functional.compressed_ffn`.
        keep_first, keep_last: how many real tokens at either end of a row stay whole: merge and
            adapter pass them by, and they get the dense sublayer's value. By default the family's
            number of first ones, and none at the end.
        keep: ids of tokens that stay whole wherever they stand. The encoder must get ``input_ids``
            then. See :func:`keep` for tokens of one batch.
        pack: whether the CPU keeps packed copies of the FFNs' weights, as large as these in the
            dtype of the products; :func:`describe` tells their bytes. Without, inference is slower.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: an argument does not fit, the model is patched already, accelerate
        offloads it, or somebody replaced what is to be patched, or has a module of the name that
        plugins take. Nothing has changed then.
    """
    return apply(
        model,
        T5_FAMILIES,
        ratio,
        ratios,
        bottleneck,
        activation,
        placements,
        backend,
        keep_first,
        keep_last,
        keep,
        pack,
    )


def patch_bert(
    model: Model,
    ratio: Any = None,
    ratios: Iterable[int] = (2, 4, 8),
    bottleneck: int = 64,
    activation: str = "tanh",
    placements: Iterable[str] = ("ffn",),
    backend: str = "auto",
    *,
    keep_first: int | None = None,
    keep_last: int = 0,
    keep: Iterable[int] | None = None,
    pack: bool = True,
) -> Model:
    """:func:`patch_t5` for a BERT, RoBERTa, DistilBERT or ELECTRA encoder, with or without a head.

    The norm comes after the residual here: ``y = LayerNorm(x + o)``.

    Raises:
        TypeError, ValueError: as :func:`patch_t5`; the model is a decoder (``config.is_decoder``);
        or ``config.chunk_size_feed_forward`` is not 0.
    """
    return apply(
        model,
        BERT_FAMILIES,
        ratio,
        ratios,
        bottleneck,
        activation,
        placements,
        backend,
        keep_first,
        keep_last,
        keep,
        pack,
    )


def patch(
    model: Model,
    ratio: Any = None,
    ratios: Iterable[int] = (2, 4, 8),
    bottleneck: int = 64,
    activation: str = "tanh",
    placements: Iterable[str] = ("ffn",),
    backend: str = "auto",
    *,
    keep_first: int | None = None,
    keep_last: int = 0,
    keep: Iterable[int] | None = None,
    pack: bool = True,
) -> Model:
    """:func:`patch_t5` or its like, by the encoder that ``model`` holds at any depth.

    A ``SentenceTransformer``, a DPR encoder and an ``EncoderDecoderModel`` are taken too.

    Raises:
        TypeError, ValueError: the family is not known; else as :func:`patch_t5`.
    """
    return apply(
        model,
        tuple(FAMILIES.values()),
        ratio,
        ratios,
        bottleneck,
        activation,
        placements,
        backend,
        keep_first,
        keep_last,
        keep,
        pack,
    )


def unpatch(model: Model) -> Model:
    """Take every plugin off: the original classes, keys and outputs, bit for bit.

    Raises:
        ValueError: the model is not patched, or somebody replaced a patched ``forward`` since.
    """
    remove(model)
    prepack.cache.thaw(model.parameters())
    prepack.cache.forget(model.parameters())
    return model


def apply(
    model: Model,
    families: tuple[Family, ...],
    ratio: Any,
    ratios: Iterable[int],
    bottleneck: int,
    activation: str,
    placements: Iterable[str] = PLACEMENTS,
    backend: str = "auto",
    keep_first: int | None = None,
    keep_last: int = 0,
    keep: Iterable[int] | None = None,
    pack: bool = True,
) -> Model:
    """:func:`patch_t5` for a model of any of ``families``."""
    if isinstance(model, nn.Module) and is_patched(model):
        raise ValueError("model is already patched: use set_ratio(), or unpatch() it first")
    found = find(model, families)
    check_unwrapped(model)
    check_present(found.encoder)
    check_unchanged(found)
    config, active = configure(ratio, ratios, bottleneck, activation, placements, backend, pack)
    backends.resolve(config.backend, found.like(0))
    chosen = kept.configure(keep_first, keep_last, keep, found.family.keep_first, found.vocabulary)
    method, sites = Variator(config), sites_of(found)
    state = State(found.family.name, method, sites, found.owners)
    state.kept = chosen
    state.level = state.check(active)
    modules = {
        i: method.parameters(found.hidden_size, found.like(i), layer.training)
        for i, layer in found.own_layers
    }
    install(model, found, state, modules)
    return model
