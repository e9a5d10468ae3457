"""The public functions: checks, sizes, the start; and the plain model at the end."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ... import checks
from ...sites import classes
from ...sites.layout import layout_of
from ...sites.residual import Layout
from . import calibration_data as data
from . import constants, importance, sizes
from .assemble import Builder, copy_buffers, plain, share_alike
from .closed_form import closed_form
from .composition import WEIGHT, addition_of, composition_of, is_composed
from .selection import select
from .sizes import Sizes

STARTS = ("select", "pca")
PROJECTION = "variator_projection"
"""The attribute of a projected model that holds its :class:`Projection`."""
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Projection:
    """What :func:`project` made."""

    start: str
    importance: str
    sizes: Sizes
    original: Sizes
    parameters: int
    """Of the small model when it is merged; parameters that are shared count once."""
    original_parameters: int
    untied: bool
    """Whether a head that was the embedding is one of its own now."""

    @property
    def share(self) -> float:
        return self.parameters / self.original_parameters

    def __str__(self) -> str:
        (hidden, ffn), (own_hidden, own_ffn) = self.sizes, self.original
        return (
            f"hidden size {own_hidden} -> {hidden}, FFN size {own_ffn} -> {ffn}: "
            f"{self.parameters:,} parameters, {100 * self.share:.1f} % of "
            f"{self.original_parameters:,}"
        )


def project(
    model: Any,
    batches: Iterable[Mapping[str, Any]] | None = None,
    params: float | None = None,
    *,
    hidden: int | None = None,
    ffn: int | None = None,
    start: str = "pca",
    importance: str | None = None,
    untie: bool | None = None,
) -> Any:
    """A smaller model whose matrices are ``P_out · W · P_in + A`` of this one's (Projected
    Compression, arXiv 2506.22255).

    It is of the same class and is trained like any other model: P, A, norms and biases are its
    parameters. The matrices of ``model`` are its W: they are shared, not copied, and stay as they
    are. :func:`merge` makes a plain model of it. LLaMA, Mistral, Qwen2, Qwen3, Gemma and T5s; BERT
    and relatives in FFN width alone.

    Args:
        model: of ``transformers``, not patched; it is only read.
        batches: arguments of ``model``, with ``input_ids``: some thousand tokens of what it will be
            used on. Only ``start="select"`` with ``importance="weight"`` needs none.
        params: the share of parameters that stay, in (0, 1]; both widths shrink alike, to multiples
            of 64 where the share and the configuration's class leave the choice.
        hidden, ffn: or the sizes themselves; one that is not given stays.
        start: ``"pca"``: the stream in its principal components, and what each matrix reads fitted
            by least squares, layer by layer; ``"select"``: dimensions are dropped, which is hard
            pruning.
        importance: which dimensions (``"pca"``: FFN neurons) stay: the largest mean
            ``"activation"``, ``"weight"`` norm, or ``"gated"`` product in front of an FFN's last
            matrix, the default where FFNs are gated.
        untie: give a head that is the embedding a matrix of its own. By default so with ``"pca"``,
            where it is fitted better alone, if the family's configuration can say so.

    Returns:
        The small model, in the mode of ``model``; ``small.variator_projection`` tells its sizes and
        its share of the parameters, which are logged too.

    Raises:
        TypeError, ValueError: an argument does not fit, the family is not known, the model is
        patched, or its configuration class refuses the sizes. FloatingPointError: activations are
        not finite. ``model`` is as it was.
    """
    checks.choice(start, STARTS, "start")
    layout = layout_of(model)
    kind = importance_kind(layout, importance)
    untied = _untied(layout, untie, start)
    chosen = sizes.chosen(model, layout, params, hidden, ffn, untied)
    if start == "select" and kind == "weight":
        given: list[data.Batch] = []
    else:
        given = data.checked(batches, f"start {start!r} looks at the model's activations")
    own = sizes.sizes_of(model, layout)
    made = Projection(
        start,
        kind,
        chosen,
        own,
        sizes.parameters(model, layout, chosen, untied),
        sizes.parameters(model, layout, own),
        untied,
    )
    LOG.info("%s", made)
    if untied:
        LOG.warning(
            "the head was the embedding, it is a matrix of its own now (untie=False keeps it)"
        )
    with data.evaluating(model):
        scores = importance_of(model, layout, kind, given)
        builder = Builder(model, layout, chosen, untied)
        fold = _fold(model, builder)
        if start == "select" or chosen == own:
            select(builder, scores, chosen, own, fold)
        else:
            closed_form(builder, scores, chosen, own, fold, given)
    return mark(builder.finish(), made)


def mark(small: Any, made: Projection) -> Any:
    """``small`` is a projected model from here on, to whoever saves it too."""
    setattr(small, PROJECTION, made)
    for notify in classes.when_patched:
        notify()
    return small


importance_kind, importance_of = importance.kind_for, importance.measured


def _untied(layout: Layout, untie: bool | None, start: str) -> bool:
    row = layout.residual
    can = layout.tied and row is not None and row.unties
    if untie is None:
        return can and start == "pca"
    if checks.flag(untie, "untie") and not can:
        raise ValueError(
            "untie must be False for a model whose head is not the embedding"
            if not layout.tied
            else f"untie must be False for a {layout.family!r}, whose configuration is always tied"
        )
    return untie


def _fold(model: Any, builder: Builder) -> constants.Constants:
    if builder.layout.residual is None:
        return constants.Constants(1.0, 1.0)
    ours = constants.measured(builder.small, builder.layout)
    theirs = constants.measured(model, builder.layout)
    return constants.Constants(theirs.embedding / ours.embedding, theirs.head / ours.head)


def is_projected(model: nn.Module) -> bool:
    return any(is_composed(module) for module in model.modules())


def check_projected(small: Any, argument: str) -> Projection:
    """What :func:`project` made of it.

    Raises:
        ValueError: ``small`` has no P and A.
    """
    made: Projection | None = getattr(small, PROJECTION, None)
    if made is not None and is_projected(small):
        return made
    if made is not None:
        raise ValueError(
            f"{argument} must have projections, got a {type(small).__name__} in which nothing was "
            f"reduced ({made}): project with params below 1, or a smaller hidden or ffn"
        )
    raise ValueError(
        f"{argument} must be what vk.project made, and not merged, got a {type(small).__name__}"
    )


@torch.no_grad()
def merge(small: Any) -> Any:
    """The plain model that a projected one computes: ``save_pretrained`` writes it, and plain
    ``transformers`` loads it. ``small`` stays as it is.

    Raises:
        ValueError: ``small`` is not projected.
    """
    made = getattr(small, PROJECTION, None)
    if made is None:
        raise ValueError(
            f"small must be a model that vk.project made, got a {type(small).__name__}"
        )
    merged = plain(small, copy.deepcopy(small.config))
    share_alike(small, merged)
    for name, parameter in merged.named_parameters():
        path, _, leaf = name.rpartition(".")
        module = small.get_submodule(path)
        if leaf == WEIGHT and is_composed(module):
            # What forwards use may be older than what was written through .data.
            parameter.data = composition_of(module).fresh(addition_of(module))
        else:
            parameter.data = getattr(module, leaf).detach().clone()
    copy_buffers(small, merged)
    return merged.train(small.training)
