"""Tiny random models: every test of a patched model starts here."""

from __future__ import annotations

import torch
import transformers
from torch import nn

import variator_kernels as vk

PREFIX = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
VARIANTS = [
    ("t5", "relu"),
    ("t5", "gated-gelu"),
    ("t5", "gated-silu"),
    ("mt5", "gated-gelu"),
    ("umt5", "gated-gelu"),
]
SIZES = {
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 4,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def model(
    family: str = "t5",
    act: str = "relu",
    head: str = "ForConditionalGeneration",
    dropout: float = 0.0,
    **settings,
):
    """A random model of the family, in eval mode; the same weights every time."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{PREFIX[family]}Config")(
        **SIZES | settings, feed_forward_proj=act, dropout_rate=dropout
    )
    made = getattr(transformers, f"{PREFIX[family]}{head}")(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "DenseReluDense" in name:
                parameter.normal_(std=0.3)
    return made.eval()


def train_plugins(patched: nn.Module, std: float = 0.1) -> None:
    """Random values in place of the initial ones, as if trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vk.plugin_parameters(patched):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def patched(*args, ratio: int = 4, ratios=(2, 4), activation: str = "tanh", **settings):
    """A patched model with random plugins."""
    made = vk.patch(
        model(*args, **settings), ratio=ratio, ratios=ratios, bottleneck=6, activation=activation
    )
    train_plugins(made)
    return made


def batch(*lengths: int, left: bool = False, width: int | None = None, seed: int = 0):
    """Token ids and mask of rows with these numbers of real tokens."""
    width = width or max(lengths)
    ids = torch.randint(2, 40, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        real = slice(width - length, width) if left else slice(0, length)
        mask[row, real] = 1
    return ids * mask, mask


def encode(made, ids, mask=None, **settings):
    return made.get_encoder()(ids, attention_mask=mask, **settings).last_hidden_state


def snapshot(made):
    """All that patching could leave behind."""
    classes = [(name, type(module)) for name, module in made.named_modules()]
    attributes = [sorted(vars(module)) for module in made.modules()]
    return classes, attributes, list(made.state_dict())
