"""What is around an encoder's blocks, and how many weights modules have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .flops_lora import low_rank
from .sites.family import lookup


def outside_blocks(encoder: nn.Module, rows: int, length: int) -> int:
    """Products of embeddings, a token (ELECTRA's, ALBERT's; a convolution: DeBERTa-v2's), and
    poolers (BERT's), a row."""
    found: list[tuple[int, Any]] = [(rows * length, lookup(encoder, path)) for path in _TOKENS]
    found += [(rows, lookup(encoder, path)) for path in ("pooler.dense", "pooler")]
    return sum(vectors * _product(module) for vectors, module in found)


_TOKENS = (
    "embeddings_project",
    "encoder.embedding_hidden_mapping_in",
    "embeddings.embed_proj",
    "embeddings.map_inputs_layer",
    "embeddings.xpath_embeddings.xpath_unitseq2_inner",
    "embeddings.xpath_embeddings.inner2emb",
    "encoder.conv.conv",
)


def _product(module: Any) -> int:
    """Multiply-adds a vector."""
    if isinstance(module, nn.Conv1d):
        return module.weight.numel()
    if not hasattr(module, "in_features"):
        return 0
    return module.in_features * module.out_features + low_rank([module]).macs


def parameters(modules: Iterable[nn.Module]) -> int:
    """Elements of all weights, each once; of a quantised linear layer those that it stands for."""
    sizes: dict[int, int] = {}
    for module in modules:
        sizes |= {id(p): p.numel() for p in module.parameters(recurse=False)}
        linear: Any = module
        weight = getattr(linear, "weight", None)
        if not (hasattr(linear, "in_features") and hasattr(linear, "out_features")):
            continue
        size = linear.in_features * linear.out_features
        if id(weight) in sizes:  # which may hold several values an element
            sizes[id(weight)] = size
        elif callable(weight):  # quantize_dynamic's: weight and bias are packed
            bias = linear.bias()
            sizes[id(linear)] = size + (0 if bias is None else bias.numel())
    return sum(sizes.values())
