"""The small model at its start, at sizes that are settled."""

from __future__ import annotations

from typing import Any

from ...sites.residual import Layout
from . import constants
from .assemble import Builder
from .calibration_data import Batch
from .closed_form import closed_form
from .importance import OUTPUT, measured
from .selection import select
from .sizes import Sizes, sizes_of

SELECT, PCA = "select", "pca"
STARTS = (SELECT, PCA)


def started(
    model: Any, layout: Layout, kind: str, start: str, sizes: Sizes, untied: bool,
    batches: list[Batch],
) -> Any:  # fmt: skip
    """By one of :data:`STARTS`; ``kind``: of importance."""
    own = sizes_of(model, layout)
    scores = None if kind == OUTPUT else measured(model, layout, kind, batches)
    builder = Builder(model, layout, sizes, untied)
    fold = _fold(model, builder)
    if start == SELECT or sizes == own:
        select(builder, scores, sizes, own, fold)
    else:
        closed_form(builder, scores, sizes, own, fold, batches)
    return builder.finish()


def _fold(model: Any, builder: Builder) -> constants.Constants:
    if builder.layout.residual is None:
        return constants.Constants(1.0, 1.0)
    ours = constants.measured(builder.small, builder.layout)
    theirs = constants.measured(model, builder.layout)
    return constants.Constants(theirs.embedding / ours.embedding, theirs.head / ours.head)
