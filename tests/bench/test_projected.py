"""bench.projected: rows of every arm, checked, with JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.projected import __main__ as bench
from bench.projected import step
from tests.train import toy


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """A model, its tokenizer, and text."""
    toy.llama(tmp_path / "model", hidden_size=32, head_dim=8)
    (tmp_path / "wikitext2").mkdir()
    for name in ("valid.txt", "test.txt"):
        toy.plain_text(tmp_path / "wikitext2" / name, 60)
    words = ["--model", tmp_path / "model", "--data", tmp_path, "--output", tmp_path / "out"]
    words += ["--length", "16", "--calibrate", "8", "--rows", "8", "--seeds", "2"]
    return [str(word) for word in words]


def test_every_arm(given, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.training, "ROWS", 2)
    assert bench.main([*given, "--shares", "0.8", "--tokens", "64", "--teacher"]) == 0
    path = tmp_path / "out" / "projected_model.json"
    content = json.loads(path.read_text())
    assert path.with_suffix(".png").stat().st_size > 1000
    rows = content["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["start"] for row in rows if not row["tokens"]] == list(bench.STARTS)
    trained = [(r["start"], r["training"], r["seed"]) for r in rows if r["tokens"]]
    assert len(set(trained)) == len(trained) == 2 * 2 * 2
    dense = content["model"]["loss"]
    assert all(row["excess"] == pytest.approx(row["loss"] - dense) for row in rows)
    assert all(row["parameters"] <= 0.8 * content["model"]["parameters"] for row in rows)


def test_no_number_without_its_check(given, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "agrees", lambda *models: "merged logits are off by 0.1")
    assert bench.main([*given, "--shares", "0.8"]) == 1
    rows = json.loads((tmp_path / "out" / "projected_model.json").read_text())["rows"]
    assert all(row["status"] == "failed" and "loss" not in row for row in rows)


def test_the_check_sees_other_logits(given, tmp_path):
    from transformers import AutoModelForCausalLM

    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / "model") for _ in range(2))
    ids = torch.arange(8)[None]
    assert bench.agrees(one, two, ids) == ""
    with torch.no_grad():
        two.model.norm.weight.mul_(1.1)
    assert "off by" in bench.agrees(one, two, ids)


def test_time_of_a_step(given, tmp_path):
    words = [word for word in given if word not in ("--calibrate", "--rows", "--seeds", "8", "2")]
    assert step.main([*words, "--share", "0.8", "--tokens", "64", "--batch", "2"]) == 0
    rows = json.loads((tmp_path / "out" / "projected_step_model.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["plain", "projected"]
    assert all(len(row["seconds"]) == 5 and row["tokens"] == 64 for row in rows)
    assert rows[0]["over_plain"] == 1 and rows[1]["counted"] > 0
