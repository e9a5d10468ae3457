"""bench.projected: rows of every arm, checked, with JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.projected import __main__ as bench
from bench.projected import speed, step
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


def test_rows_of_several_runs_add_up(given, tmp_path, capsys):
    """Chosen starts at chosen sizes, then another start beside them; another model is refused."""
    path, first = tmp_path / "out" / "projected_model.json", tmp_path / "first.json"
    words = [*given, "--sizes", "24:32", "--bf16", "--seeds", "1"]
    trained = [*words, "--starts", "select", "--trainings", "plain", "--tokens", "64"]
    assert bench.main(trained) == 0
    path.rename(first)
    assert bench.main([*words, "--starts", "pca", "--add", str(first)]) == 0
    rows = json.loads(path.read_text())["rows"]
    named = {(row["start"], row["training"], row["bf16"]) for row in rows}
    assert named == {("select", "none", False), ("select", "plain", True), ("pca", "none", False)}
    assert len(rows) == 3 and {(row["hidden"], row["ffn"]) for row in rows} == {(24, 32)}
    assert all(0 < row["share"] < 1 for row in rows)
    other = json.loads(first.read_text())
    other["model"]["parameters"] += 1
    old = json.loads(first.read_text())
    old["rows"][0]["start"] = "pca, tied"
    for content, message in ((other, "must hold results of {"), (old, "has older rows")):
        first.write_text(json.dumps(content))
        with pytest.raises(SystemExit):
            bench.main([*words, "--starts", "pca", "--add", str(first)])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("option, word", [("--starts", "svd"), ("--trainings", "twice")])
def test_names_that_are_not_known(given, capsys, option, word):
    with pytest.raises(SystemExit):
        bench.main([*given, "--shares", "0.8", option, word])
    assert f"{option[2:]} must be some of" in (said := capsys.readouterr().err)
    assert f"got {word!r}" in said


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
    assert 0 < rows[0]["peak_bytes"] < rows[1]["peak_bytes"] + 2**22
    assert {row["status"] for row in rows} == {"ok"}


def speed_of(given: list[str]) -> list[str]:
    """The command line of bench.projected.speed on the same model."""
    return [*given[:2], *given[4:6], "--shares", "0.8", "--length", "16", "--tokens", "2"]


def test_speed_beside_what_is_promised(given, tmp_path):
    words = [*speed_of(given), "--rounds", "2", "--dtype", "fp32"]
    assert speed.main(words) == 0
    rows = json.loads((tmp_path / "out" / "projected_speed_model.json").read_text())["rows"]
    assert [(row["arm"], row["share"]) for row in rows] == [("original", 1.0), ("merged", 0.8)]
    for name in speed.PASSES:
        assert rows[0][name]["promised"] == rows[0][name]["speedup"]["median"] == 1
        found = rows[1][name]
        assert found["kept"] == pytest.approx(found["speedup"]["median"] / found["promised"])
        assert found["promised"] > 1


def test_multiply_adds_are_those_of_the_weights_and_of_causal_attention(given, tmp_path):
    from transformers import AutoModelForCausalLM

    from bench.decoder.levels import Level

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    config, run = model.config, speed.Run(model, Level())
    prompt = torch.arange(1, 7)[None]
    found = speed.multiply_adds(run, prompt)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "layers" in n)
    head = config.vocab_size * config.hidden_size
    pairs = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert found["first"] == 6 * matrices + head + pairs * 21
    assert found["next"] == matrices + head + pairs * 7


def test_no_speed_without_its_check(given, tmp_path, monkeypatch):
    monkeypatch.setattr(speed.whole, "agrees", lambda *models: "merged logits are off by 0.1")
    assert speed.main([*speed_of(given), "--rounds", "1", "--dtype", "fp32"]) == 1
    rows = json.loads((tmp_path / "out" / "projected_speed_model.json").read_text())["rows"]
    assert rows[1]["status"] == "failed" and "first" not in rows[1]
