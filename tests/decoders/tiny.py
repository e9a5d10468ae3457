"""Tiny random decoders, and what merged keys mean, said with loops."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn

import variator_kernels as vk

VOCABULARY, D, LAYERS, HEADS, KEY_HEADS = 50, 32, 3, 4, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": D // HEADS,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"attn_logit_softcapping": None, "query_pre_attn_scalar": 4}),
    "gemma3_text": ("Gemma3", {"query_pre_attn_scalar": 4}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "olmo2": ("Olmo2", {}),
}
"""By ``model_type``: the classes' prefix, and settings in which all layers see everything."""
CUTS = [[29], [11, 20, 29], [1, 2, 3, 5, 8, 29], list(range(1, 30))]
"""Where a prompt of 29 tokens is cut."""


def config(family: str = "llama", **settings):
    prefix, own = FAMILIES[family]
    name = f"{prefix}TextConfig" if family.endswith("_text") else f"{prefix}Config"
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    given = SIZES | own | settings
    if family in ("gemma2", "gemma3_text") and "layer_types" not in given:
        given["layer_types"] = ["full_attention"] * given["num_hidden_layers"]
    return kind(**given)


def model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **settings):
    """With a head, in evaluation."""
    torch.manual_seed(seed)
    kind = getattr(transformers, f"{FAMILIES[family][0]}ForCausalLM")
    made = kind(config(family, **settings)).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def patched(family: str = "llama", ratio=None, seed: int = 0, **settings):
    """With plugins that are no initial ones."""
    keys = ("keep_first", "keep_last", "keep", "window", "backend", "ratios", "pack")
    own = {key: settings.pop(key) for key in keys if key in settings}
    made = model(family, seed, **settings)
    vk.patch(made, {"attention_kv": 3} if ratio is None else ratio, **own)
    train(made, seed)
    return made


def train(patched_model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vk.plugin_parameters(patched_model):
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise)


def ids(rows: int = 2, n: int = 29, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, n), generator=generator)


def in_pieces(patched_model, tokens, cuts, cache=None, **arguments):
    """Logits ``[B, n, V]`` of a prompt that comes in pieces, and the cache."""
    cache = transformers.DynamicCache() if cache is None else cache
    found, begin = [], 0
    for end in cuts:
        part = {key: value[:, begin:end] for key, value in arguments.items()}
        if "attention_mask" in arguments:
            part["attention_mask"] = arguments["attention_mask"][:, :end]
        found.append(patched_model(tokens[:, begin:end], past_key_values=cache, **part).logits)
        begin = end
    return torch.cat(found, 1), cache


def padded(lengths: list[int], side: str, seed: int = 0):
    """Token ids, mask and positions of rows of these lengths."""
    n = max(lengths)
    tokens, mask = ids(len(lengths), n, seed), torch.zeros(len(lengths), n, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(n - length, n) if side == "left" else slice(0, length)] = 1
    return tokens, mask, (mask.cumsum(1) - 1).clamp_min(0)


def seen(scheme, s: int) -> tuple[int, list[int]]:
    """What the query of rank s sees: the number of merged keys, and the ranks of plain ones."""
    k, window = scheme.ratio, scheme.window
    groups = min(max(0, s + 1 - window) // k, s // k)
    return groups, list(range(k * groups, s + 1))


def attention_of_row(layer, h, positions, scheme, rotary):
    """The specification with loops: ``h [n, d]``, real tokens alone; without norm and residual."""
    attention, plugin = layer.self_attention(), layer.plugins[str(scheme.ratio)]
    size, kept, k = attention.head_size, scheme.kept, scheme.ratio

    def rotated(vector, position):  # [heads, size]
        if not getattr(layer, "use_rope", True):
            return vector
        cos, sin = rotary(h[None], torch.tensor([[position]], dtype=torch.float64))
        cos, sin = cos[0, 0].double(), sin[0, 0].double()
        half = torch.cat((-vector[..., size // 2 :], vector[..., : size // 2]), -1)
        return vector * cos + half * sin

    def key_and_value(vector):
        key, value = (
            (w @ vector + (0 if b is None else b)).view(-1, size)
            for w, b in ((attention.w_k, attention.b_k), (attention.w_v, attention.b_v))
        )
        return (key if attention.k_norm is None else attention.k_norm(key[None, None])[0, 0]), value

    plain = [key_and_value(vector) for vector in h]
    plain = [(rotated(key, p), value) for (key, value), p in zip(plain, positions, strict=True)]
    merged = []
    for group in range(max(0, len(h) - kept) // k):
        members = slice(kept + group * k, kept + (group + 1) * k)
        scores = plugin.merge.weight @ h[members].flatten() + plugin.merge.bias
        vector = scores.softmax(0) @ h[members]
        key, value = key_and_value(vector)
        merged.append((rotated(key, sum(positions[members]) / k), value))
    found = []
    for number in range(len(h)):
        entries = [(*plain[at], 0.0) for at in range(min(number + 1, kept))]
        if number >= kept:
            groups, ranks = seen(scheme, number - kept)
            entries += [(*merged[group], math.log(k)) for group in range(groups)]
            entries += [(*plain[kept + rank], 0.0) for rank in ranks]
        query = attention.w_q @ h[number] + (0 if attention.b_q is None else attention.b_q)
        query = query.view(-1, size)
        if attention.q_norm is not None:
            query = attention.q_norm(query[None, None])[0, 0]
        query = rotated(query, positions[number])
        out = []
        for head, vector in enumerate(query):
            shared = head // (len(query) // len(entries[0][0]))
            scores = torch.stack(
                [attention.scale * vector @ key[shared] + bias for key, _, bias in entries]
            )
            values = torch.stack([value[shared] for _, value, _ in entries])
            out.append(scores.softmax(0) @ values)
        o = attention.w_o @ torch.cat(out)
        found.append(o if attention.b_o is None else o + attention.b_o)
    return torch.stack(found)
