"""Plain text as batches of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from ..harness.machine import ROOT

DATA = ROOT.parent / "shared" / "data"
"""Where the measurements' data lie, beside the repository."""
Batch = dict[str, Tensor]


def paragraphs(path: Path, count: int, least: int = 400) -> list[str]:
    """The first paragraphs (lines that are no heading) of at least ``least`` characters.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it has fewer of them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data must be a text file, there is no {path}")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    found = [line for line in lines if len(line) >= least and not line.startswith("=")][:count]
    if len(found) < count:
        raise ValueError(
            f"data must hold {count} paragraphs of {least} characters, {path} has {len(found)}"
        )
    return found


def batches(texts: list[str], tokenizer: Path, length: int, batch: int) -> list[Batch]:
    """``input_ids`` and ``attention_mask``, rows of at most ``length`` tokens, right-padded."""
    tokenize: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    return [
        dict(
            tokenize(
                texts[start : start + batch],
                truncation=True,
                max_length=length,
                padding=True,
                return_token_type_ids=False,
                return_tensors="pt",
            )
        )
        for start in range(0, len(texts), batch)
    ]
