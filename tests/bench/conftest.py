"""A model small enough to measure in a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TINY = {
    "model_type": "t5",
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 100,
}


@pytest.fixture(params=["relu", "gated-gelu"])
def tiny(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A folder that holds a configuration and no weights."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {**TINY, "feed_forward_proj": request.param}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
