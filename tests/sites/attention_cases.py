"""What tests of attention's placements share: patched models, sublayers called by themselves."""

from __future__ import annotations

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny, zoo
from variator_kernels.sites.find import find

NAMES = ["bert", "t5", "umt5", "mpnet", "modernbert", "bart", "distilbert", "eurobert"]
NAMES += ["longt5", "longt5-global", "roformer", "esm", "deberta", "deberta-v2", "layoutlmv3"]
every = pytest.mark.parametrize("name", NAMES)
placed = pytest.mark.parametrize("placement", ["attention_kv", "attention"])


def patched(name, *placements, ratio=3, attention=None, **settings):
    """A model with random plugins; skips where this version of transformers has other modules."""
    if not zoo.installed(name):
        pytest.skip(f"this version of transformers has no {name}")
    own = {key: settings.pop(key) for key in list(settings) if key.startswith("config_")}
    model = zoo.plain(name, attention, **{k.removeprefix("config_"): v for k, v in own.items()})
    try:
        vk.patch(model, ratio, (2, 3), 6, placements=placements, **settings)
    except ValueError as error:
        if "another version of transformers" in str(error):
            pytest.skip(str(error))
        raise
    tiny.train_plugins(model)
    return model


def positions(model, mask):
    if mask is None or find(model).family.name not in zoo.GIVEN:
        return {}
    first = 2 if find(model).family.name == "mpnet" else 0
    return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0) + first}


def encode(model, ids, mask=None, **given):
    encoder = find(model).encoder
    given = positions(model, mask) | given
    return encoder(ids, attention_mask=mask, **given).last_hidden_state


def turned(model, x, number=0):
    """What a block gives its self-attention besides: cosines and sines of the tokens' columns."""
    reach = find(model).attentions[number].variator_reach
    if reach.rotary is None:
        return {}
    if reach.paths.sines:
        return {reach.paths.turned: reach.rotary.weight[None, None, : x.shape[1]].to(x.dtype)}
    found = reach.rotation(x, torch.arange(x.shape[1])[None])
    return {reach.paths.turned: (found.cos, found.sin)}


def places(x, seed=0):
    """On a page, of ``x [B, n, d]``: as LayoutLMv3's encoder gets them, boxes of any order and
    columns that begin anew, as behind a text."""
    rows, n = x.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.randint(0, 200, (rows, n, 4), generator=generator)
    columns = torch.arange(n).remainder(max(1, 2 * n // 3)).expand(rows, -1)
    return {"bbox": boxes, "position_ids": columns}


def sublayer(model, x, mask, number=0, ratio=3):
    """The self-attention sublayer on ``x [B, n, d]``, in a forward over tokens of ``mask``."""
    found = find(model)
    layer, state = found.attentions[number], found.encoder.variator_state
    extra = turned(model, x, number)
    state.local.context = state.context(state.check(ratio), mask)
    state.local.context.carried = places(x)
    try:
        y = layer(x, attention_mask=None, **extra)
    finally:
        state.local.context = None
    return y[0] if isinstance(y, tuple) else y


def ragged(dtype=torch.float64, left=False):
    """Hidden states and mask: a tail and a hole, few tokens, none at all; NaN in padding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 11, zoo.D, generator=generator, dtype=dtype)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[1, 2:] = False
    mask[2] = False
    if left:
        mask = mask.flip(1)
    mask[0, 4] = False
    return torch.where(mask[..., None], x, torch.nan), mask
