"""The decoder, its twins with plugins, and the text."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import variator_kernels as vk

from .. import internals
from ..cases import models
from ..tools import smollm2

TEXT = Path("wikitext2") / "test.txt"


def architecture(name: str) -> models.Architecture:
    """``smollm2``, or a folder with config.json, perhaps weights and a tokenizer."""
    folder = smollm2.folder() if name == "smollm2" else Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model must be smollm2 or a folder with config.json, got {name!r}")
    return models.of_folder(folder, internals.decoders(), "smollm2" if name == "smollm2" else "")


def whole(name: str) -> models.Architecture:
    """The same, with weights and a tokenizer; ``ValueError`` without."""
    found = architecture(name)
    if found.folder is None or found.tokenizer is None:
        raise ValueError(f"model must be a folder with weights and a tokenizer, got {name}")
    return found


def load(model: models.Architecture, dtype: torch.dtype) -> Any:
    """The model with its head; random weights are the same in every call."""
    how: Any = {"attn_implementation": "sdpa"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if model.folder:
            how |= {"local_files_only": True, "dtype": torch.float32}
            built = AutoModelForCausalLM.from_pretrained(model.folder, **how)
        else:
            built = AutoModelForCausalLM.from_config(model.config, **how)
    return models.cast(built, dtype)


def tokenizer(model: models.Architecture) -> Any:
    """Of a folder that has one; without a padding token it pads with the end's."""
    found: Any = AutoTokenizer.from_pretrained(model.tokenizer, local_files_only=True)
    found.pad_token = found.pad_token or found.eos_token
    return found


def text(model: models.Architecture, data: Path, count: int) -> Tensor:
    """So many tokens of wikitext2's test text, ``[count]``; random ones without a tokenizer.

    Raises:
        ValueError: there are fewer. FileNotFoundError: there is no such text.
    """
    if model.tokenizer is None:
        return models.tokens(1, count, model.config.vocab_size)[0]
    if not (data / TEXT).is_file():
        raise FileNotFoundError(f"data must be a folder with {TEXT}, got {data}")
    read = (data / TEXT).read_text(encoding="utf-8")
    found: Tensor = tokenizer(model)(read, return_tensors="pt")["input_ids"]
    if found.shape[1] < count:
        raise ValueError(f"data must hold {count} tokens, {data / TEXT} has {found.shape[1]}")
    return found[0, :count]


def patched(dense: Any, ratios: Iterable[int], window: int, backend: str = "auto") -> Any:
    """A twin on the same weights with plugins at their initial values, dense until told."""
    twin = models.sharing(dense, "sdpa")
    places = ("ffn", "attention_kv")
    vk.patch(twin, 1, tuple(ratios), placements=places, window=window, backend=backend)
    return twin.requires_grad_(False)


def with_plugins(dense: Any, folder: Path, window: int | None) -> Any:
    """A twin with trained plugins; None: under the window that they were trained with."""
    twin = models.sharing(dense, "sdpa")
    vk.load_plugins(twin, folder)
    if window is not None:
        internals.set_window(twin, window)
    return twin.requires_grad_(False)
