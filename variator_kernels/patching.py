"""Putting plugins around a model's FFNs, and taking them off again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from . import backends, checks
from .methods.variator import Plugin
from .runtime.ratio import STATE, PluginState, states
from .sites.classes import ORIGINAL, patched_class
from .sites.families import BERT_FAMILIES, FAMILIES, T5_FAMILIES, Family
from .sites.find import Found, check_unchanged, find, is_patched

PLACEMENTS = ("ffn",)
DEFAULT = 4
"""The active ratio, where there is such a one."""
_OWN_LIST = "variator_own_ignore_list"
Model = TypeVar("Model", bound=nn.Module)


def patch_t5(
    model: Model,
    ratio: int | None = None,
    ratios: Iterable[int] = (2, 4, 8),
    bottleneck: int = 64,
    activation: str = "tanh",
    placements: Iterable[str] = ("ffn",),
    backend: str = "auto",
) -> Model:
    """Put compression plugins around the encoder FFNs of a T5, mT5 or umT5 model, in place.

    Base parameters keep their names, values and ``requires_grad``: freeze them yourself to train
    plugins alone. The plugins of a sublayer are ``plugins[str(k)]``; ``model.save_pretrained``
    leaves them out (:func:`save_plugins` stores them). Decoders stay dense.

    Args:
        model: holds one encoder of these families, at any depth, or is it.
        ratio: the active one; 1 is dense. It is added to ``ratios`` if it is not there. By default
            4, or the first of ``ratios`` if 4 is not among them.
        ratios: every k that gets plugins, each at least 2.
        bottleneck, activation: r and φ of the plugins.
        placements: only ``("ffn",)``.
        backend: as in :func:`functional.compressed_ffn`.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: an argument does not fit, the model is patched already, or somebody
        replaced what is to be patched. Nothing has changed then.
    """
    families = T5_FAMILIES
    return apply(model, families, ratio, ratios, bottleneck, activation, placements, backend)


def patch_bert(
    model: Model,
    ratio: int | None = None,
    ratios: Iterable[int] = (2, 4, 8),
    bottleneck: int = 64,
    activation: str = "tanh",
    placements: Iterable[str] = ("ffn",),
    backend: str = "auto",
) -> Model:
    """:func:`patch_t5` for a BERT, RoBERTa, DistilBERT or ELECTRA encoder, with or without a head.

    The norm comes after the residual here: ``y = LayerNorm(x + o)``.

    Raises:
        TypeError, ValueError: as :func:`patch_t5`; the model is a decoder (``config.is_decoder``);
        or ``config.chunk_size_feed_forward`` is not 0.
    """
    families = BERT_FAMILIES
    return apply(model, families, ratio, ratios, bottleneck, activation, placements, backend)


def patch(
    model: Model,
    ratio: int | None = None,
    ratios: Iterable[int] = (2, 4, 8),
    bottleneck: int = 64,
    activation: str = "tanh",
    placements: Iterable[str] = ("ffn",),
    backend: str = "auto",
) -> Model:
    """:func:`patch_t5` or its like, by ``model.config.model_type``.

    Raises:
        TypeError, ValueError: the family is not known; else as :func:`patch_t5`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(f"model must be of a known family, {tuple(FAMILIES)}, got {kind!r}")
    families = (FAMILIES[kind],)
    return apply(model, families, ratio, ratios, bottleneck, activation, placements, backend)


def unpatch(model: Model) -> Model:
    """Take every plugin off: the original classes, keys and outputs, bit for bit.

    Raises:
        ValueError: the model is not patched, or somebody replaced a patched ``forward`` since.
    """
    states(model)
    patched = [module for module in model.modules() if STATE in vars(module)]
    for module in patched:
        # What accelerate leaves behind after training in mixed precision goes too.
        if "forward" in vars(module) and "_original_forward" not in vars(module):
            raise ValueError(
                f"the forward of {type(module).__name__} was replaced after patching; undo that "
                "before unpatch()"
            )
    _ignore_on_save(model, False)
    for module in patched:
        for name in ("forward", "_original_forward"):
            vars(module).pop(name, None)
        delattr(module, STATE)
        if "plugins" in module._modules:
            del module.plugins
        module.__class__ = getattr(type(module), ORIGINAL)
    return model


def plugin_parameters(model: nn.Module, ratios: Iterable[int] | None = None) -> list[nn.Parameter]:
    """The parameters of all plugins, or of those of ``ratios``: what there is to train.

    Raises:
        ValueError: the model is not patched, or has no plugins for one of ``ratios``.
    """
    wanted = None if ratios is None else tuple(ratios)
    for state in states(model):
        for k in wanted or ():
            if k not in state.ratios:
                raise ValueError(f"ratios must have plugins, {state.ratios}, got {k!r}")
    return [
        parameter
        for module in model.modules()
        if STATE in vars(module) and "plugins" in module._modules
        for k, plugin in module.plugins.items()  # type: ignore[union-attr,operator]
        if wanted is None or int(k) in wanted
        for parameter in plugin.parameters()
    ]


def apply(
    model: Model,
    families: tuple[Family, ...],
    ratio: int | None,
    ratios: Iterable[int],
    bottleneck: int,
    activation: str,
    placements: Iterable[str] = PLACEMENTS,
    backend: str = "auto",
) -> Model:
    """:func:`patch_t5` for a model of any of ``families``."""
    if isinstance(model, nn.Module) and is_patched(model):
        raise ValueError("model is already patched: use set_ratio(), or unpatch() it first")
    found = find(model, families)
    check_unchanged(found)
    active, every = _ratios(ratio, ratios)
    state = PluginState(
        family=found.family.name,
        ratio=active,
        ratios=every,
        bottleneck=checks.ratio(bottleneck, "bottleneck"),
        activation=checks.choice(activation, checks.ADAPTER_ACTIVATIONS, "activation"),
        placements=_placements(placements),
        backend=checks.choice(backend, ("auto", *backends.BACKENDS), "backend"),
    )
    backends.resolve(backend, found.like(0))
    plugins = [_plugins(found, position, state) for position in range(len(found.layers))]

    for layer, modules in zip(found.layers, plugins, strict=True):
        layer.plugins = modules
    for part, name in found.parts():
        part.__class__ = patched_class(found.family, name)
        setattr(part, STATE, state)
    _ignore_on_save(model, True)
    return model


def _ratios(ratio: int | None, ratios: Iterable[int]) -> tuple[int, tuple[int, ...]]:
    """The active one, and all."""
    try:
        given = list(ratios)
    except TypeError:
        raise ValueError(f"ratios must be a sequence of integers >= 2, got {ratios!r}") from None
    every = [checks.ratio(k, "ratios", least=2) for k in given]
    active = None if ratio is None else checks.ratio(ratio)
    every += [] if active in (None, 1) else [active]
    if not every:
        raise ValueError("ratios must name at least one ratio >= 2, got ()")
    if active is None:
        active = DEFAULT if DEFAULT in every else every[0]
    return active, tuple(sorted(set(every)))


def _placements(placements: Iterable[str]) -> tuple[str, ...]:
    given = (placements,) if isinstance(placements, str) else tuple(placements)
    if given != PLACEMENTS:
        raise ValueError(f"placements must be {PLACEMENTS} in this version, got {given}")
    return given


def _plugins(found: Found, position: int, state: PluginState) -> nn.ModuleDict:
    like = found.like(position)
    modules = {
        str(k): Plugin(
            found.hidden_size,
            k,
            state.bottleneck,
            state.activation,
            device=like.device,
            dtype=like.dtype,
        )
        for k in state.ratios
    }
    return nn.ModuleDict(modules).train(found.layers[position].training)


def _ignore_on_save(model: nn.Module, ignore: bool) -> None:
    """Tell every ``PreTrainedModel`` in ``model`` which keys ``save_pretrained`` leaves out."""
    for module in model.modules():
        if not hasattr(module, "_keys_to_ignore_on_save"):
            continue
        owner: Any = module
        keys = {
            f"{name}.plugins.{key}".lstrip(".")
            for name, layer in module.named_modules(remove_duplicate=False)
            if STATE in vars(layer) and "plugins" in layer._modules
            for key in layer._modules["plugins"].state_dict()  # type: ignore[union-attr]
        }
        if not keys:
            continue
        before = set(owner._keys_to_ignore_on_save or ())
        if ignore:
            # Older versions keep it on the class alone: unpatch then leaves nothing behind.
            setattr(owner, _OWN_LIST, "_keys_to_ignore_on_save" in vars(owner))
            owner._keys_to_ignore_on_save = before | keys
        else:
            owner._keys_to_ignore_on_save = before - keys
            if not vars(owner).pop(_OWN_LIST, True):
                del owner._keys_to_ignore_on_save
