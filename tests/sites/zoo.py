"""A tiny random model of every family in the table."""

from __future__ import annotations

import functools
import inspect

import torch
import transformers
from torch import nn

from tests.sites import tiny
from variator_kernels.sites.families import BART_FAMILIES, FAMILIES, T5_FAMILIES
from variator_kernels.sites.family import Family

D, F, LAYERS, HEADS, VOCABULARY = 24, 40, 2, 4, 40
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = IDS | {
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
}
T5 = tiny.SIZES | {"d_model": D, "d_ff": F, "num_layers": LAYERS}
BART = IDS | {
    "d_model": D,
    "encoder_layers": LAYERS,
    "decoder_layers": 1,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": F,
    "decoder_ffn_dim": F,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
OWN = {
    "t5": {"feed_forward_proj": "relu"},
    "mt5": {"feed_forward_proj": "gated-gelu"},
    "umt5": {"feed_forward_proj": "gated-gelu"},
    "longt5": {"feed_forward_proj": "gated-gelu", "local_radius": 3},
    "distilbert": {
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "dim": D,
        "hidden_dim": F,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "max_position_embeddings": 64,
    },
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16, "num_hidden_layers": 3, "num_hidden_groups": 2},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roformer": {"embedding_size": 16},
    # It makes these tables in any case, by default of 13 million numbers, which copies carry.
    "roc_bert": {
        "enable_pronunciation": False,
        "pronunciation_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "enable_shape": False,
        "shape_vocab_size": 8,
        "shape_embed_dim": 8,
    },
    "markuplm": {"max_depth": 4, "xpath_unit_hidden_size": 8},
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 4, "shape_size": 4},
    "lilt": {"channel_shrink_ratio": 2},
    "tapas": {"type_vocab_sizes": [3, 8, 8, 2, 8, 8, 3]},
    "convbert": {"embedding_size": D, "conv_kernel_size": 3},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "longformer": {"attention_window": 4},
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "type_vocab_size": 0,
    },
    "esm": {"position_embedding_type": "rotary", "token_dropout": False},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    "eurobert": {"num_key_value_heads": 2, "mask_token_id": 3},
}
"""What a family's configuration calls by other names, or has besides."""
FORMS = {
    "longt5-global": (
        "longt5",
        {"encoder_attention_type": "transient-global", "global_block_size": 2},
    ),
}
"""Further models of families: other attention, by configuration."""
ABSOLUTE = {"bart", "mbart", "plbart", "mvp", "led", "bigbird_pegasus", "marian", "pegasus"} | {
    "blenderbot",
    "blenderbot-small",
    "distilbert",
    "roformer",
}
"""Positions are those of columns and cannot be given: left padding moves a row, plugins or not."""
GIVEN = {
    *("bert", "electra", "ernie", "rembert", "roc_bert", "splinter", "layoutlm", "tapas"),
    *(
        "mpnet",
        "bert-generation",
        "convbert",
        "big_bird",
        "deberta",
        "deberta-v2",
        "albert",
        "megatron-bert",
    ),
}
"""Positions are absolute and can be given."""
BLOCKS = {"longt5-global"}
"""Where attention is dense, blocks of tokens are those of columns: left padding moves a row."""
LEAKS = {"convbert": "its convolutions read padding"}
"""Where a row of the dense model depends on its padding already."""


def family(name: str) -> Family:
    """The row of a family or a form."""
    return FAMILIES[FORMS.get(name, (name,))[0]]


def config(name: str, **settings):
    row, more = family(name), FORMS.get(name, (name, {}))[1]
    name, settings = row.name, more | settings
    base = T5 if row in T5_FAMILIES else BART if row in BART_FAMILIES else BERT
    base = {} if name == "distilbert" else base
    return transformers.AutoConfig.for_model(name, **base | OWN.get(name, {}) | settings)


def one_layer(name: str) -> dict[str, int]:
    """Settings for a compiler that takes seconds a layer."""
    row = FAMILIES[name]
    if name == "albert":
        return {"num_hidden_layers": 1, "num_hidden_groups": 1}
    if name == "distilbert":
        return {"n_layers": 1}
    if row in T5_FAMILIES:
        return {"num_layers": 1}
    return {"encoder_layers" if row in BART_FAMILIES else "num_hidden_layers": 1}


def installed(name: str) -> bool:
    """Whether this version of transformers has the family."""
    try:
        transformers.AutoConfig.for_model(family(name).name)
    except ValueError:
        return False
    return True


NAMES = [name for name in (*FAMILIES, *FORMS) if not family(name).decoder and installed(name)]


def plain(name: str, attention: str | None = None, **settings) -> nn.Module:
    """A random model in eval mode; norms and biases are no longer ones and zeros."""
    torch.manual_seed(0)
    made = config(name, **settings)
    if name == "bert-generation":
        model = transformers.BertGenerationEncoder._from_config(made, attn_implementation=attention)
    else:
        model = transformers.AutoModel.from_config(made, attn_implementation=attention)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name == "roformer" and "embed_positions" in key:
                continue  # sines and cosines
            if "norm" in key.lower() and parameter.dim() == 1:
                low = -0.5 if key.endswith("bias") else 0.5
                parameter.uniform_(low, low + 1)
            elif key.endswith("bias") or "embeddings" in key or "embed_tokens" in key:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=0.2)
    return model.eval()


@functools.cache
def runs(name: str, dtype: torch.dtype) -> bool:
    """Whether the plain model runs in ``dtype``."""
    model, ids = plain(name).to(dtype), torch.full((1, 3), 5)
    row = family(name)
    encoder = getattr(model, "encoder", model) if row in (*BART_FAMILIES, *T5_FAMILIES) else model
    try:
        encoder(ids)
    except RuntimeError:
        return False
    return True


def arguments(block: nn.Module) -> dict[str, None]:
    """What a block of older versions of transformers wants besides hidden states and mask."""
    names = inspect.signature(block.forward).parameters
    return {"layer_head_mask": None} if "layer_head_mask" in names else {}
