"""State dicts that have no plugins, loaded into a patched model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from ..runtime.state import STATE

ATTACHED = "plugins"
"""Under this name a site's sublayer has what a method put there."""
_loaded = ContextVar("variator_plugins_are_loaded", default=False)


@contextmanager
def plugins_are_loaded() -> Iterator[None]:
    """In the block a state dict needs no plugins: the model has the ones that belong to it."""
    token = _loaded.set(True)
    try:
        yield
    finally:
        _loaded.reset(token)


def check_loaded(encoder: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Warns if ``state_dict`` has all of a sublayer but its plugins: they would stay what they are
    without a word where ``strict=False``. Inside :func:`plugins_are_loaded` it gets those instead.
    """
    told = False
    for name, layer in encoder.named_modules(prefix=prefix.rstrip("."), remove_duplicate=False):
        if STATE not in vars(layer) or ATTACHED not in layer._modules:
            continue
        start = f"{name}." if name else ""
        inside = f"{start}{ATTACHED}."
        values = {f"{start}{key}": value for key, value in layer.state_dict().items()}
        plugins = {key: value for key, value in values.items() if key.startswith(inside)}
        base = values.keys() - plugins.keys()
        if not base <= state_dict.keys() or not plugins.keys().isdisjoint(state_dict):
            continue
        if _loaded.get():
            state_dict.update(plugins)
        elif not told:
            told = True
            warnings.warn(
                "the state dict has no plugins for this patched model, which keeps its own: "
                "load_plugins() those that belong to it, from where save_plugins or "
                "save_pretrained wrote them",
                UserWarning,
                stacklevel=4,
            )
