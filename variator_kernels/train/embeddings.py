"""Models of sentence-transformers: the encoder inside, and what makes embeddings of its states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

MODULES = "modules.json"
"""The file that tells a folder of sentence-transformers."""


def is_embedder(folder: str | Path) -> bool:
    """Whether ``folder`` holds a model of sentence-transformers."""
    return (Path(folder) / MODULES).is_file()


class Pooler(nn.Module):
    """A ``SentenceTransformer``'s own modules behind its encoder, frozen, and unit length.

    Args:
        modules: each takes and returns a dict of features, as sentence-transformers has it.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.modules_behind = nn.ModuleList(modules)
        self.requires_grad_(False).eval()

    def forward(self, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """``[B, e]`` fp32, rows of length 1, of the last hidden states ``[B, n, d]``."""
        mask = batch["attention_mask"]
        # What padding holds is nobody's business, and a mean multiplies it by 0: NaN would stay.
        hidden = hidden.float().masked_fill(mask[..., None] == 0, 0)
        features = {**batch, "token_embeddings": hidden}
        with torch.autocast(hidden.device.type, enabled=False):
            for module in self.modules_behind:
                features = module(features)
        return F.normalize(features["sentence_embedding"], dim=-1)


def load(folder: str | Path, attention: str | None = None) -> tuple[Any, Any, Pooler]:
    """The encoder of a sentence-transformers folder in fp32, its tokenizer, and its pooler.

    The tokenizer's ``model_max_length`` is what the model's ``encode`` cuts texts to.

    Raises:
        ImportError: the package is not installed. ValueError: the folder's first module is no
        transformer, or no module pools its tokens.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"model {folder} is one of sentence-transformers: pip install sentence-transformers"
        ) from error
    settings = {"dtype": "float32"} | ({"attn_implementation": attention} if attention else {})
    made = SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs=settings
    )
    first, *behind = made.children()
    model = getattr(first, "auto_model", None)
    if not isinstance(model, PreTrainedModel):
        got = type(first).__name__
        raise ValueError(f"model {folder} must start with a transformer, got the module {got}")
    pooler = Pooler(behind)
    try:
        pooler(torch.zeros(1, 1, model.config.hidden_size), {"attention_mask": torch.ones(1, 1)})
    except KeyError as error:  # of a feature that nothing makes
        names = [type(module).__name__ for module in made.children()]
        raise ValueError(
            f"model {folder} must make one embedding of a text from its last hidden states, got "
            f"modules {names}, which want {error}"
        ) from error
    return model.eval(), made.tokenizer, pooler
