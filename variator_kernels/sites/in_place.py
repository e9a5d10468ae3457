"""The encoder of a patched model, whose layers must still be those that were patched."""

from __future__ import annotations

from torch import nn

from ..runtime.state import STATE, State, states
from .find import find
from .found import Found
from .mixins import SITE


def patched(model: nn.Module) -> tuple[Found, State]:
    """The one encoder in ``model`` and what its sites share.

    Raises:
        ValueError: the model is not patched, or as :func:`check_in_place`.
    """
    states(model)
    found = find(model)
    state: State = vars(found.encoder)[STATE]
    check_in_place(found, state)
    return found, state


def check_in_place(found: Found, state: State) -> None:
    """Levels, plans and files name layers by their numbers when the model was patched.

    Raises:
        ValueError: layers were removed, added or moved since.
    """
    if state.layers not in (0, len(found.layers)):
        raise ValueError(_moved(f"{state.layers} they were, {len(found.layers)} there are"))
    for site, owner in zip(state.sites, state.owners, strict=True):
        own = vars(found.at(site)).get(SITE)
        if own is None or own.number != owner:
            was = "not there" if own is None else f"layer {own.site.layer}"
            raise ValueError(_moved(f"what is layer {site.layer} now was {was}"))


def _moved(what: str) -> str:
    return (
        f"model's layers must be those that were patched, in their order: {what}. Unpatch the "
        "model, change its layers, then patch it again"
    )
