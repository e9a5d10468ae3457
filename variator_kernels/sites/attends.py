"""Whether self-attention is what a family of somebody's own says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.keep import keep
from ..runtime.level import Level
from ..runtime.levels import use_ratio
from ..runtime.state import State
from .found import Found

ROWS, LENGTH = 2, 9


@torch.no_grad()
def check_attends(found: Found, state: State) -> None:
    """Where all tokens stay whole, compressed attention of the patched encoder is the dense one.

    Raises:
        ValueError: it is not, on a few random token ids, or the encoder fails on them.
    """
    encoder = found.encoder
    like = found.like(0)
    if like.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    most = min(found.vocabulary, 1000)
    ids = torch.randint(most, (ROWS, LENGTH), generator=generator).to(like.device)
    mask = torch.ones_like(ids)
    mask[1, LENGTH // 2 :] = 0
    attention = Level(
        tuple(
            1 if site.placement == "ffn" else state.method.placements[site.placement][0]
            for site in state.sites
        )
    )
    modes = [(module, module.training) for module in encoder.modules()]
    warned, state.warned = state.warned, True
    kept = state.kept
    if found.family.decoder:  # where all of a row is in the window
        state.kept = kept._replace(window=LENGTH + 1)
    encoder.eval()
    try:
        with use_ratio(encoder, 1):
            expected = _last(encoder(ids, **{found.family.mask: mask}))[mask > 0]
        with use_ratio(encoder, attention), keep(encoder, torch.ones_like(mask)):
            got = _last(encoder(ids, **{found.family.mask: mask}))[mask > 0]
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"family.attention of {found.family.name!r} does not fit {type(encoder).__name__}, "
            f"which fails on token ids {list(ids.shape)}: {error}"
        ) from error
    finally:
        state.warned, state.kept = warned, kept
        for module, training in modes:
            module.training = training
    off = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    if not off <= (1e-3 if like.dtype.itemsize >= 4 else 5e-2):
        raise ValueError(
            f"family.attention of {found.family.name!r} does not describe what "
            f"{type(encoder).__name__} computes: with all tokens whole the output is off by "
            f"{off:.2g} of its norm. Compare with its forward: q, k and v, scale, norm and "
            "residual, table, rotary or sines, window, distances, places, and terms of positions "
            "that have no field"
        )


def _last(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.last_hidden_state
