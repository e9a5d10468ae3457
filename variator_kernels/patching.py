"""Putting plugins around a model's FFNs, and taking them off again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .applying import Model, apply
from .ops import prepack
from .ops.int8_linear import torchao
from .runtime import kept
from .sites.decoder_families import DECODER_FAMILIES
from .sites.families import BERT_FAMILIES, FAMILIES, T5_FAMILIES
from .sites.family import Family
from .sites.install import remove


def patch_t5(
    model: Model,
    ratio: Any = None,
    ratios: Iterable[int] | Mapping[str, Iterable[int]] = (2, 4, 8),
    bottleneck: int = 64,
    activation: str = "tanh",
    placements: Iterable[str] = ("ffn",),
    backend: str = "auto",
    *,
    keep_first: int | None = None,
    keep_last: int = 0,
    keep: Iterable[int] | None = None,
    window: int = kept.WINDOW,
    pack: bool = True,
    precision: str | None = None,
    optimize: str | None = None,
) -> Model:
    """Put compression plugins around the encoder FFNs of a T5, mT5, umT5 or LongT5, in place.

    Base parameters keep their names, values and ``requires_grad``: freeze them yourself to train
    plugins alone. The plugins of a sublayer are ``plugins[str(k)]``; ``model.save_pretrained``
    writes them beside the plain model, as :func:`save_plugins` does. Decoders stay dense.

    Args:
        model: holds one encoder of these families, at any depth, or is it.
        ratio: the active one, as :func:`set_ratio` takes it; 1 is dense. It is added to ``ratios``
            if it is not there. By default 4, or the first of ``ratios`` if 4 is not among them.
            A mapping and a :class:`Plan` imply their placements.
        ratios: every k that gets plugins, each at least 2; or a mapping of placements to them.
        bottleneck, activation: r and φ of the plugins.
        placements: where plugins go: ``"ffn"``, around feed-forward sublayers;
            ``"attention_kv"``, in front of the keys and values of self-attention, whose queries
            stay whole; ``"attention"``, around self-attention. The last two exclude each other.
        backend: as in :func:`functional.compressed_ffn`.
        keep_first, keep_last: how many real tokens at either end of a row stay whole: merge and
            adapter pass them by, and they get the dense sublayer's value. By default the family's
            number of first ones, and none at the end.
        keep: ids of tokens that stay whole wherever they stand. The encoder must get ``input_ids``
            then. See :func:`keep` for tokens of one batch.
        window: in decoders' ``attention_kv``, how many of the last keys stay plain, a query's own
            among them. Without effect elsewhere.
        pack: whether the CPU keeps packed copies of the FFNs' weights, as large as these in the
            dtype of the products; :func:`describe` tells their bytes. Without, inference is slower.
        precision: ``"int8"`` runs the frozen products of patched sublayers (the FFN's; attention's
            four where a placement is at attention) in int8 in inference on the CPU, dense levels
            too: weights with a scale an output channel, vectors that are rounded on the way with a
            scale each. Inference is ``eval()`` with gradients disabled (``torch.no_grad()``).
            Training, calibration and other devices take the model's own dtype. It is a choice of
            this run: plugin files do not hold it. ``python -m variator_kernels`` tells what
            multiplies here; where nothing does, the model's own dtype stays.
        optimize: ``"sublayers"``: linear layers of patched sublayers run as packed products in
            inference on the CPU at dense levels too; ``"encoder"``: so do all others of the
            encoder's blocks, in ``precision`` if it is given, and dense sublayers of encoders run
            in few passes, where nothing is asked of them that only their modules do. Values of
            real tokens are then the model's own but for the rounding of sums (or int8's). None: a
            dense level is the original, bit for bit; with ``precision`` as ``"sublayers"``.

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
        window,
        pack,
        precision,
        optimize,
    )


def patch_bert(
    model: Model,
    ratio: Any = None,
    ratios: Iterable[int] | Mapping[str, Iterable[int]] = (2, 4, 8),
    bottleneck: int = 64,
    activation: str = "tanh",
    placements: Iterable[str] = ("ffn",),
    backend: str = "auto",
    *,
    keep_first: int | None = None,
    keep_last: int = 0,
    keep: Iterable[int] | None = None,
    window: int = kept.WINDOW,
    pack: bool = True,
    precision: str | None = None,
    optimize: str | None = None,
) -> Model:
    """:func:`patch_t5` for BERT and relatives (see docs/families.md), with or without a head.

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
        window,
        pack,
        precision,
        optimize,
    )


def patch_llama(
    model: Model,
    ratio: Any = None,
    ratios: Iterable[int] | Mapping[str, Iterable[int]] = (2, 4, 8),
    bottleneck: int = 64,
    activation: str = "tanh",
    placements: Iterable[str] = ("ffn",),
    backend: str = "auto",
    *,
    keep_first: int | None = None,
    keep_last: int = 0,
    keep: Iterable[int] | None = None,
    window: int = kept.WINDOW,
    pack: bool = True,
    precision: str | None = None,
    optimize: str | None = None,
) -> Model:
    """:func:`patch_t5` for LLaMA and relatives (see docs/families.md), with or without a head.

    ``ffn`` is compressed in prompts, in whole groups; steps of decoding are dense there.
    ``attention_kv`` merges keys in prompts and in decoding, behind the first ``keep_first`` tokens
    and in front of the last ``window``. ``attention`` is refused.

    Raises:
        TypeError, ValueError: as :func:`patch_t5`.
    """
    return apply(
        model,
        DECODER_FAMILIES,
        ratio,
        ratios,
        bottleneck,
        activation,
        placements,
        backend,
        keep_first,
        keep_last,
        keep,
        window,
        pack,
        precision,
        optimize,
    )


def patch(
    model: Model,
    ratio: Any = None,
    ratios: Iterable[int] | Mapping[str, Iterable[int]] = (2, 4, 8),
    bottleneck: int = 64,
    activation: str = "tanh",
    placements: Iterable[str] = ("ffn",),
    backend: str = "auto",
    *,
    keep_first: int | None = None,
    keep_last: int = 0,
    keep: Iterable[int] | None = None,
    window: int = kept.WINDOW,
    pack: bool = True,
    precision: str | None = None,
    optimize: str | None = None,
    family: Family | None = None,
) -> Model:
    """:func:`patch_t5` or its like, by the encoders that ``model`` holds at any depth.

    A ``SentenceTransformer``, a DPR encoder and an ``EncoderDecoderModel`` are taken too. Several
    encoders (a bi-encoder's) are patched alike.

    Args:
        family: where a model outside of the table has its FFNs. On small random inputs it is
            checked that this describes what they compute.

    Raises:
        TypeError, ValueError: the family is not known, or ``family`` does not describe the model;
        else as :func:`patch_t5`.
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
        window,
        pack,
        precision,
        optimize,
        family,
    )


def unpatch(model: Model) -> Model:
    """Take every plugin off: the original classes, keys and outputs, bit for bit.

    Raises:
        ValueError: the model is not patched, or somebody replaced a patched ``forward`` since.
    """
    remove(model)
    packed = [*model.parameters(), *torchao.memory(model.parameters())]
    prepack.cache.thaw(packed)
    prepack.cache.forget(packed)
    return model
