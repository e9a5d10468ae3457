"""Models that are large enough to be packed, for tests of ``optimize=``."""

from __future__ import annotations

import torch
from torch import nn

from variator_kernels.ops.frozen_linear import FrozenLinear


def plain(name: str, dtype=torch.float32) -> nn.Module:
    """A model whose weights are large enough to be packed."""
    from transformers import (
        BertConfig,
        BertModel,
        LlamaConfig,
        LlamaModel,
        ModernBertConfig,
        ModernBertModel,
        T5Config,
        T5EncoderModel,
    )

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 128, "intermediate_size": 256}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    made = {
        "bert": lambda: BertModel(BertConfig(**sizes)),
        "modernbert": lambda: ModernBertModel(ModernBertConfig(**sizes, pad_token_id=0)),
        "llama": lambda: LlamaModel(LlamaConfig(**sizes)),
        "t5": lambda: T5EncoderModel(
            T5Config(vocab_size=100, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
        ),
    }[name]()
    return made.eval().requires_grad_(False).to(dtype)


def batch():
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 100, (3, 50), generator=source)
    mask = torch.ones_like(ids)
    mask[1, 31:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def forward(model):
    return model(**batch()).last_hidden_state[batch()["attention_mask"].bool()]


def swapped(model):
    return [m for m in model.modules() if isinstance(m, FrozenLinear)]
