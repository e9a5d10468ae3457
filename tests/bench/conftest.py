"""A model small enough to measure in a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.methods.test_calibration import few_steps  # noqa: F401 - a fixture

TINY = {
    "model_type": "t5",
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 100,
}


BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}
DISTILBERT = {
    "model_type": "distilbert",
    "dim": 64,
    "hidden_dim": 128,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": 100,
}


def written(tmp_path: Path, config: dict) -> str:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(params=["relu", "gated-gelu"])
def tiny(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A folder that holds a configuration and no weights."""
    return written(tmp_path, {**TINY, "feed_forward_proj": request.param})


# Of what does not depend on the FFN or the family: files, refusals, rows without a number.
one_ffn = pytest.mark.parametrize("tiny", ["relu"], indirect=True)
one_bert = pytest.mark.parametrize("tiny_bert", [BERT], indirect=True, ids=["bert"])


@pytest.fixture(params=[BERT, DISTILBERT], ids=lambda config: config["model_type"])
def tiny_bert(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The same of a BERT."""
    return written(tmp_path, request.param)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 100,
}


@pytest.fixture
def tiny_llama(tmp_path: Path) -> str:
    """The same of a decoder."""
    return written(tmp_path, LLAMA)
