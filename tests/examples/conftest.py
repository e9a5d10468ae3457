"""A tiny classifier with plugins, as examples/serve reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import variator_kernels as vk

WORDS = [f"word{i}" for i in range(30)]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``model/`` and ``plugins/`` of ratios 2 and 4."""
    path = tmp_path_factory.mktemp("serve")
    (path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    )
    transformers.BertTokenizerFast(vocab_file=str(path / "vocab.txt")).save_pretrained(
        path / "model"
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=5 + len(WORDS), id2label={0: "negative", 1: "positive"},
        initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(path / "model")
    vk.patch(model, 2, (2, 4))
    with torch.no_grad():
        for parameter in vk.plugin_parameters(model):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    vk.save_plugins(model, path / "plugins")
    return path
