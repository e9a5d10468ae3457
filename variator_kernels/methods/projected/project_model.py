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
from . import sizes
from .assemble import copy_buffers, plain, share_alike
from .composition import WEIGHT, addition_of, composition_of, is_composed
from .importance import WEIGHT as BY_WEIGHT
from .importance import kind_for
from .search import searched
from .sizes import Sizes
from .starts import PCA, SELECT, STARTS, started

SPLITS = ALIKE, SEARCH = "alike", "search"
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
    split: str | None = None,
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
        params: the share of parameters that stay, in (0, 1]; sizes are multiples of 64 where the
            share and the configuration's class leave the choice.
        hidden, ffn: or the sizes themselves; one that is not given stays.
        split: how ``params`` is divided between both: ``"search"``, the default of ``"pca"``, tries
            some ways on a few thousand tokens and takes the one whose start diverges least from
            ``model`` on other batches; ``"alike"``: both widths shrink alike.
        start: ``"pca"``: the stream in its principal components, and what each matrix reads fitted
            by least squares, layer by layer; ``"select"``: dimensions are dropped, which is hard
            pruning.
        importance: which dimensions (``"pca"``: FFN neurons) stay: the largest mean
            ``"activation"``, ``"weight"`` norm, or ``"gated"`` product in front of an FFN's last
            matrix, the default of ``"select"`` where FFNs are gated; or, the default of ``"pca"``,
            those without which an FFN's ``"output"`` would lose most, the others fitted anew.
        untie: give a head that is the embedding a matrix of its own. By default so with ``"pca"``
            and a narrower stream, if the family's configuration can say so; a search tries both.

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
    kind = kind_for(layout, importance, start == PCA)
    searches = _searches(layout, split, params, start)
    own = sizes.sizes_of(model, layout)
    narrows = params not in (None, 1) or hidden not in (None, own.hidden)
    untied = _untied(layout, untie, start == PCA and narrows and not searches)
    chosen = sizes.chosen(model, layout, params, hidden, ffn, untied)
    if start == SELECT and kind == BY_WEIGHT and not searches:
        given: list[data.Batch] = []
    else:
        given = data.checked(batches, f"start {start!r} looks at the model's activations")

    def begun(tried: Sizes, apart: bool, seen: list[data.Batch]) -> Any:
        return started(model, layout, kind, start, tried, apart, seen)

    with data.evaluating(model):
        if searches and chosen != own:
            heads = [False, True] if untie is None and _unties(layout) else [untied]
            alike = chosen, untied
            assert params is not None
            chosen, untied = searched(model, layout, params, heads, given, begun, alike)
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
        small = begun(chosen, untied, given)
    return mark(small.train(model.training), made)


def mark(small: Any, made: Projection) -> Any:
    """``small`` is a projected model from here on, to whoever saves it too."""
    setattr(small, PROJECTION, made)
    for notify in classes.when_patched:
        notify()
    return small


def _searches(layout: Layout, split: str | None, params: Any, start: str) -> bool:
    """Whether ways to divide a share are tried; with one width there are none."""
    if split is not None and checks.choice(split, SPLITS, "split") and params is None:
        raise ValueError(f"params must be given for split to divide, got None with {split!r}")
    wanted = split == SEARCH or (split is None and start == PCA)
    # Without a head there are no distributions to compare.
    return wanted and params is not None and layout.residual is not None and bool(layout.head)


def _unties(layout: Layout) -> bool:
    """Whether a head that is the embedding can become a matrix of its own."""
    return layout.tied and layout.residual is not None and layout.residual.unties


def _untied(layout: Layout, untie: bool | None, pays: bool) -> bool:
    if untie is None:
        return _unties(layout) and pays
    if checks.flag(untie, "untie") and not _unties(layout):
        raise ValueError(
            "untie must be False for a model whose head is not the embedding"
            if not layout.tied
            else f"untie must be False for a {layout.family!r}, whose configuration is always tied"
        )
    return untie


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
