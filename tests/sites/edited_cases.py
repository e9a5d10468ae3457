"""Models that are edited before they are patched, or behind it."""

from __future__ import annotations

import torch
from torch import nn

import variator_kernels as vk
from tests.sites import int8_cases, tiny
from variator_kernels.sites.find import find

PLACES = {"ffn": 2, "attention_kv": 2}
IDS, MASK = tiny.batch(40, 31)


def patched(model: nn.Module) -> nn.Module:
    made = int8_cases.patch(model, 1, (2,), placements=tuple(PLACES), optimize="encoder")
    for parameter in vk.plugin_parameters(made):
        nn.init.normal_(parameter, 0, 0.1)
    return made


@torch.no_grad()
def hidden(model: nn.Module) -> torch.Tensor:
    return find(model).encoder(IDS, attention_mask=MASK).last_hidden_state[MASK.bool()]
