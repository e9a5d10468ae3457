"""Tiny random models: every test of a patched model starts here."""

from __future__ import annotations

import inspect

import torch
import transformers
from torch import nn

import variator_kernels as vk
from variator_kernels.sites.find import find

PREFIX = {
    "t5": "T5",
    "mt5": "MT5",
    "umt5": "UMT5",
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "electra": "Electra",
}
T5_VARIANTS = [
    ("t5", "relu"),
    ("t5", "gated-gelu"),
    ("t5", "gated-silu"),
    ("mt5", "gated-gelu"),
    ("umt5", "gated-gelu"),
]
BERT_VARIANTS = [
    ("bert", "gelu"),
    ("roberta", "gelu_new"),
    ("distilbert", "gelu"),
    ("electra", "relu"),
]
VARIANTS = [*T5_VARIANTS, *BERT_VARIANTS]
BERTS = [family for family, _ in BERT_VARIANTS]
SIZES = {
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 4,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BERT_NAMES = {
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
DISTILBERT_NAMES = {
    "d_model": "dim",
    "d_ff": "hidden_dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
}


FEED_FORWARD = ("DenseReluDense", "intermediate", "output.dense", "lin1", "lin2", "classifier")


def config(family: str = "t5", act: str = "relu", dropout: float = 0.0, **settings):
    """A tiny configuration; sizes in T5's names, whatever the family."""
    kind = getattr(transformers, f"{PREFIX[family]}Config")
    if family not in BERTS:
        return kind(**SIZES | settings, feed_forward_proj=act, dropout_rate=dropout)
    if family == "distilbert":
        names = DISTILBERT_NAMES
        own = {"activation": act, "dropout": dropout, "attention_dropout": dropout}
    else:
        names = BERT_NAMES
        own = {"hidden_act": act, "type_vocab_size": 2}
        own |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if family == "electra":
        own["embedding_size"] = 16
    sizes = {names.get(key, key): value for key, value in (SIZES | settings).items()}
    del sizes["d_kv"], sizes["decoder_start_token_id"]
    return kind(max_position_embeddings=64, **own | sizes)


def bare(family: str) -> str:
    """The head of the class that is an encoder and no more."""
    return "Model" if family in BERTS else "EncoderModel"


def model(
    family: str = "t5",
    act: str = "relu",
    head: str | None = None,
    dropout: float = 0.0,
    **settings,
):
    """A random model of the family, in eval mode; the same weights every time."""
    torch.manual_seed(0)
    head = head or ("Model" if family in BERTS else "ForConditionalGeneration")
    kind = getattr(transformers, f"{PREFIX[family]}{head}")
    made = kind(config(family, act, dropout, **settings))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "layer_norm" in name or "LayerNorm" in name:
                low = -0.5 if name.endswith("bias") else 0.5
                parameter.uniform_(low, low + 1)
            elif any(part in name for part in FEED_FORWARD):
                parameter.normal_(std=0.3)
            elif "word_embeddings" in name:
                parameter.normal_()  # tokens that differ, whatever attention makes of them
    return made.eval()


def encoder(made: nn.Module):
    return find(made).encoder


def layers(made: nn.Module):
    """The FFN sublayers."""
    return find(made).layers


def run(layer: nn.Module, x: torch.Tensor):
    """The FFN sublayer as its block calls it."""
    return getattr(layer, "feed_forward_chunk", layer)(x)


def dense(layer: nn.Module, g: torch.Tensor):
    """The FFN proper."""
    if hasattr(layer, "DenseReluDense"):
        return layer.DenseReluDense(g)
    if hasattr(layer, "lin1"):
        return layer.lin2(layer.activation(layer.lin1(g)))
    return layer.output.dense(layer.intermediate(g))


def train_plugins(patched: nn.Module, std: float = 0.1) -> None:
    """Random values in place of the initial ones, as if trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vk.plugin_parameters(patched):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def patched(
    *args, ratio: int = 4, ratios=(2, 4), activation="tanh", backend: str = "auto", **settings
):
    """A patched model with random plugins."""
    names = ("keep_first", "keep_last", "keep")
    kept = {name: settings.pop(name) for name in names if name in settings}
    if args and not args[0].endswith("t5"):
        kept.setdefault("keep_first", 0)  # whatever the family says
    made = vk.patch(model(*args, **settings), ratio, ratios, 6, activation, backend=backend, **kept)
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


def takes_positions(made) -> bool:
    """Where they are absolute and cannot be given, left padding moves a row."""
    return "position_ids" in inspect.signature(encoder(made).forward).parameters


def positions(made, mask):
    """Position ids that start at each row's first real token, for models that take them."""
    family, config = find(made).family.name, made.config
    if mask is None or not takes_positions(made):
        return {}
    first = config.pad_token_id + 1 if family == "roberta" else 0
    return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0) + first}


def encode(made, ids, mask=None, **settings):
    settings = positions(made, mask) | settings
    return encoder(made)(ids, attention_mask=mask, **settings).last_hidden_state


def snapshot(made):
    """All that patching could leave behind."""
    classes = [(name, type(module)) for name, module in made.named_modules()]
    attributes = [sorted(vars(module)) for module in made.modules()]
    return classes, attributes, list(made.state_dict())
