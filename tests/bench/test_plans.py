"""bench.plans: a curve of plans and uniform ratios, and no number that was not measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, BertForSequenceClassification, BertTokenizerFast

from bench import plans
from bench.quality import originals, tasks
from tests.sites import tiny as tiny_models

WORDS = [f"word{i}" for i in range(30)]
SMALL = ("--rows", "4", "--batch", "4", "--length", "24", "--calibrate", "12", "--ratios", "2,4")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Articles of a few paragraphs."""
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    for name in ("valid.txt", "test.txt"):
        articles = []
        for i in range(12):
            lines = [" ".join(WORDS[(i * j) % 30] for j in range(n, n + 30)) for n in range(5)]
            articles.append(f" = Title {i} = \n\n" + "\n\n".join(lines))
        (folder / name).write_text("\n".join(articles) + "\n")
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and a tokenizer."""
    path = tmp_path / "bert"
    tiny_models.model("bert", "gelu").save_pretrained(path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab_file=str(vocabulary)).save_pretrained(path)
    return path


def run(*arguments: str | Path) -> int:
    return plans.main([str(argument) for argument in arguments])


def test_writes_json_and_png(folder: Path, data: Path, tmp_path: Path) -> None:
    common = ("--model", folder, "--data", data, "--output", tmp_path / "out", *SMALL)
    assert run(*common, "--placements", "ffn,attention_kv", "--fitted") == 0
    path = tmp_path / "out" / "plans_bert_ffn_attention_kv_calibrated.json"
    content = json.loads(path.read_text())
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    uniform = {r["what"]: r for r in content["rows"] if r["what"].startswith("k=")}
    made = [r for r in content["rows"] if r["what"].startswith("plan")]
    assert list(uniform) == ["k=2", "k=4"] and len(made) == 8
    assert content["settings"]["placements"] == ["ffn", "attention_kv"]
    for row in made:
        if "against" in row:
            base = uniform[row["against"]]
            assert row["cost"] <= base["cost"] + 1e-9
            assert row["ratio"] == pytest.approx(row["loss"] / base["loss"])
            assert row["ratio"] <= 1 or "fitted" in row["what"]
            assert row["unseen_ratio"] == pytest.approx(row["unseen"] / base["unseen"])
    assert sum("against" in row for row in made) == 4
    assert [row["what"] for row in made[1::2]] == [f"{row['what']}, fitted" for row in made[::2]]


def test_plugins_fitted_to_a_plan_are_put_back(folder: Path, data: Path) -> None:
    given = ("--model", folder, "--data", data, *SMALL)
    args = plans.parser().parse_args([str(argument) for argument in given])
    case = plans.paragraphs(args, plans.models.architecture(str(folder)))
    plans.plugged(case, args)
    level: Any = {"ffn": {0: 2, 1: 4}}
    before = plans.row(case, "plan", level)
    assert plans.fitted(case, "plan", level)["loss"] != before["loss"]
    assert plans.row(case, "plan", level) == before


@pytest.fixture
def classifier(folder: Path, tmp_path: Path) -> Path:
    """A model with a head, and the sentences of a task."""
    config = AutoConfig.from_pretrained(folder, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(folder)
    task = tmp_path / "sst2"
    task.mkdir()
    for split, count in (("train", 40), ("dev", 8), ("test", 12)):
        rows = [" ".join(WORDS[(i * j) % 30] for j in range(15 + i % 9)) for i in range(count)]
        lines = [f"{row}\t{i % 2}" for i, row in enumerate(rows)]
        (task / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return folder


def test_points_of_a_task_stand_beside_the_losses(
    classifier: Path, data: Path, tmp_path: Path
) -> None:
    assert run("--model", classifier, "--task", "sst2", "--data", data, "--output", tmp_path,
               *SMALL) == 0  # fmt: skip
    path = tmp_path / "plans_sst2_bert_ffn_calibrated.json"
    rows = json.loads(path.read_text())["rows"]
    assert path.with_suffix(".png").is_file()
    model, tokenizer = originals.read(classifier, task=True)
    for split in ("dev", "test"):
        held_out, correct = tasks.load(data, tasks.TASKS["sst2"], split, model, tokenizer)
        share = originals.accuracy(model, tokenizer, held_out, correct)
        assert rows[0]["what"] == "k=1" and rows[0][split] == 100 * share
        assert all(0 <= row[split] <= 100 for row in rows)
    uniform = [row["loss"] for row in rows if row["what"] in ("k=2", "k=4")]
    assert rows[0]["loss"] == rows[0]["unseen"] == 0 < min(uniform)


def test_a_plan_that_is_not_what_it_says_has_no_numbers(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "loss", lambda model, batches, level: 0.5)
    assert run("--model", folder, "--data", data, "--output", tmp_path, *SMALL) == 1
    rows = json.loads((tmp_path / "plans_bert_ffn_calibrated.json").read_text())["rows"]
    failed = [row for row in rows if row["status"] == "failed"]
    assert len(failed) == 4
    assert all("the plan says loss" in row["reason"] and "loss" not in row for row in failed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "none"), "model must be one of"),
        (("--plugins", "none"), "source must hold plugins"),
        (("--rows", "100"), "rows must be at most"),
        (("--data", "none"), "No such file"),
        (("--task", "sst2"), "there is no"),
    ],
)
def test_refuses(arguments: tuple, message: str, folder: Path, data: Path, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        run("--model", folder, "--data", data, "--output", tmp_path, *SMALL, *arguments)
    assert message in " ".join(capsys.readouterr().err.split())
