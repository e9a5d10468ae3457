"""examples/serve/prepare: from a pretrained model and sentences to what the server reads."""

from __future__ import annotations

from pathlib import Path

import pytest

import variator_kernels as vk
from examples.serve import prepare
from tests.examples.conftest import WORDS


@pytest.mark.slow
def test_makes_a_model_and_plugins(folders: Path, tmp_path: Path) -> None:
    lines = [f"{' '.join(WORDS[i % 9 : i % 9 + 4 + i % 18])}\t{i % 2}" for i in range(80)]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    arguments = ["--model", folders / "model", "--data", tmp_path, "--output", tmp_path / "made"]
    arguments += ["--steps", "2", "--plugin-steps", "2"]
    prepare.main([str(word) for word in arguments])
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "made" / "model")
    vk.load_plugins(model, tmp_path / "made" / "plugins")
    assert "trained, k=2  yes" in vk.describe(model) and model.config.id2label[1] == "positive"
    written = (tmp_path / "made" / "plugins" / "plugins.safetensors").stat().st_mtime_ns
    prepare.main([str(word) for word in arguments])
    after = (tmp_path / "made" / "plugins" / "plugins.safetensors").stat().st_mtime_ns
    assert after == written, "what is there is not made again"


def test_rows_of_similar_length_share_a_batch() -> None:
    rows = [{"input_ids": [0] * (1 + i * 7 % 50), "labels": i} for i in range(400)]
    shuffled = list(prepare.Shuffled(list(rows), 8))
    assert sorted(row["labels"] for row in shuffled) == list(range(400))
    lengths = [len(row["input_ids"]) for row in shuffled]
    spread = [max(lengths[i : i + 8]) - min(lengths[i : i + 8]) for i in range(0, 400, 8)]
    assert max(spread) <= 8 and lengths != sorted(lengths)
