"""Everything that a model makes on its first calls, made ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from .. import checks
from .find_states import found
from .levels import use_ratio

Model = TypeVar("Model", bound=nn.Module)
Inputs = Callable[[int, int], dict[str, Any]]
"""From rows and tokens a row to keyword arguments of a forward."""


def warm(
    model: Model,
    levels: Iterable[Any],
    lengths: Iterable[int],
    batches: Iterable[int] = (1,),
    inputs: Inputs | None = None,
) -> Model:
    """Run ``model`` once at every level, batch and length, so that no later call is a first one.

    Weights are packed, kernels are loaded, and a ``torch.compile``-d model gets one graph a level,
    for all batches and lengths of at least 2 (``torch.compile`` takes a size of 1 for a constant
    and makes a graph of its own). Levels are switched by :func:`use_ratio`, whose choice compiled
    code looks at before :func:`set_ratio`'s: serve a compiled model with :func:`use_ratio` too.

    Gradients are disabled; under ``torch.inference_mode()`` it runs as the caller does, and graphs
    are made for that mode.

    Args:
        model: patched, in evaluation mode; or a module that holds such models, with ``inputs``.
        levels: what :func:`use_ratio` takes, each.
        lengths: tokens a row, each at least 1.
        batches: rows, each at least 1.
        inputs: keyword arguments of a forward over ``(rows, length)`` tokens. By default random
            ``input_ids`` below ``model.config.vocab_size`` and an ``attention_mask`` of ones.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is not patched, is in training mode, or has no plugins for a level;
            nothing is asked for; or a compiled model has more levels than
            ``torch._dynamo.config.recompile_limit`` allows graphs.
    """
    wanted = list(levels)
    rows_of = [checks.integer(rows, "batches", 1) for rows in batches]
    tokens_of = [checks.integer(length, "lengths", 1) for length in lengths]
    sizes = sorted({(b, n) for b in rows_of for n in tokens_of}, reverse=True)
    if not wanted or not sizes:
        raise ValueError("levels, lengths and batches must each name at least one")
    for state in found(model):
        for level in wanted:
            state.check(level)
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval() first")
    compiled = is_compiled(model)
    if compiled:
        _check_limit(len(wanted))
    make = inputs or random_inputs(model)
    with torch.no_grad():
        for level in wanted:
            for rows, length in sizes:
                given = make(rows, length)
                if compiled:
                    _let_vary(given, rows, length)
                for _ in range(2):  # what is packed on a second look only, too
                    with use_ratio(model, level):
                        model(**given)
    return model


def random_inputs(model: nn.Module) -> Inputs:
    """Token ids and a mask without padding, on the device of the model.

    Raises:
        ValueError: the model does not say how many tokens it knows.
    """
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ValueError(
            "inputs must be given for a model without config.vocab_size: a function of rows and "
            "tokens a row that gives the keyword arguments of a forward"
        )
    device = next(model.parameters()).device

    def make(rows: int, length: int) -> dict[str, Any]:
        source = torch.Generator().manual_seed(rows * 100_003 + length)
        ids = torch.randint(vocabulary, (rows, length), generator=source).to(device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            given["decoder_input_ids"] = torch.zeros_like(ids[:, :1])
        return given

    return make


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` was called on it, or ``.compile()`` on a module of it."""
    return hasattr(model, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )


def _check_limit(levels: int) -> None:
    import torch._dynamo.config as settings

    limit = settings.recompile_limit if hasattr(settings, "recompile_limit") else 8
    if levels > limit:
        raise ValueError(
            f"levels must be at most torch._dynamo.config.recompile_limit, {limit}, for a compiled "
            f"model (beyond it, levels run uncompiled), got {levels}: set it higher first"
        )


def _let_vary(given: dict[str, Any], rows: int, length: int) -> None:
    """Graphs are for any number of rows and tokens, from the first call on."""
    import torch._dynamo

    for value in given.values():
        if not isinstance(value, torch.Tensor):
            continue
        for place, size in enumerate(value.shape[:2]):
            if size > 1 and size == (rows, length)[place]:
                torch._dynamo.maybe_mark_dynamic(value, place)
