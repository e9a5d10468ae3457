"""The placements in the benchmarks: beside one another in one run, each against its own truth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import variator_kernels as vk
from bench import plot, speed_vs_k, targets
from bench.cases import Key, encoder, models
from bench.cases.encoder import Encoder
from bench.harness import results, tables
from bench.tools import report
from tests.bench.conftest import BERT
from variator_kernels import extension

KERNELS = pytest.mark.skipif(extension.load() is None, reason="the kernels are not built")
SETS = (("ffn",), ("ffn", "attention_kv"), ("attention",))
EACH = [word for places in SETS for word in ("--placements", ",".join(places))]


def run(model: str, output: Path, *more: str) -> tuple[int, dict]:
    arguments = ["--model", model, "--output", str(output), "--quick", "--dtype", "fp32"]
    code = speed_vs_k.main([*arguments, "--scope", "encoder", *more])
    return code, json.loads((output / "speed_vs_k.json").read_text())


@KERNELS
def test_sets_beside_one_another(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["--arms", "hf,hf-sdpa,ours", "--ratios", "2,4", "--encoder-ratios", "2,4"]
    code, content = run(tiny, tmp_path, *arms, *EACH)
    assert code == 0, content
    dense, plugged = content["rows"][:2], content["rows"][2:]
    assert [(row["arm"], row["placements"]) for row in dense] == [("hf", []), ("hf-sdpa", [])]
    assert [(row["k"], tuple(row["placements"])) for row in plugged] == [
        (k, places) for k in (2, 4) for places in SETS
    ]
    assert content["settings"]["placements"] == [list(places) for places in SETS]
    model = models.encoder(models.architecture(tiny), torch.float32)
    for row in plugged:
        level = dict.fromkeys(row["placements"], row["k"])
        count = vk.flops.count(model, row["batch"], row["length"], level, 64)
        assert row["bound"] == pytest.approx(1 / count.fraction_left)
        others = {f"ours, {' + '.join(p)}" for p in SETS if list(p) != row["placements"]}
        assert set(row["speedup"]) == {"hf", "hf-sdpa", "ours", *others}
        assert row["speedup"]["ours"]["median"] == 1
        assert row["error"] <= row["allowed"]
    ffn, both = plugged[:2]
    pairs = [a / b for a, b in zip(ffn["samples"], both["samples"], strict=True)]
    assert both["speedup"]["ours, ffn"]["median"] == pytest.approx(sum(pairs) / len(pairs))
    assert len({row["bound"] for row in plugged}) == len(plugged)
    screen = capsys.readouterr().out
    assert "ours, ffn + attention_kv" in screen and "over ffn alone" in screen
    assert (tmp_path / "speed_vs_k.png").stat().st_size > 10_000


@KERNELS
def test_a_bert_longer_than_its_positions(tiny_bert: str, tmp_path: Path) -> None:
    sizes = ["--batch", "1", "--length", "600", "--placements", "ffn,attention_kv"]
    code, content = run(tiny_bert, tmp_path, "--arms", "hf-sdpa,ours", *sizes)
    assert code == 0, content["rows"]
    assert content["model"]["max_position_embeddings"] == 600
    assert [row["placements"] for row in content["rows"]] == [[], ["ffn", "attention_kv"]]


def test_positions_of_pretrained_weights_do_not_grow(tmp_path: Path) -> None:
    config = models.BertConfig(**{**BERT, "max_position_embeddings": 40})
    made = models.encoder(models.Architecture("made", config, None), torch.float32)
    made.save_pretrained(tmp_path)
    model = models.architecture(str(tmp_path))
    assert models.reaching(model, 40) is model
    with pytest.raises(ValueError, match="length must be at most 40, the positions of .*, got 41"):
        models.reaching(model, 41)


def test_roberta_begins_behind_its_padding() -> None:
    config = models.AutoConfig.for_model(
        "roberta", hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        intermediate_size=48, vocab_size=50, max_position_embeddings=12,
    )  # fmt: skip
    model = models.reaching(models.Architecture("made", config, None), 30)
    built = models.encoder(model, torch.float32)
    ids = models.tokens(1, 30, 50).clamp(min=5)
    assert built(input_ids=ids).last_hidden_state.shape == (1, 30, 32)
    assert config.max_position_embeddings == 12


def test_a_set_that_is_wrong_alone_has_no_number(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Encoder.build

    def build(self: Encoder, key: Key) -> encoder.Call:
        call = right(self, key._replace(arm="ours"))
        wrong = "attention_kv" in key.placements and key.k
        return (lambda: (call()[0] + 1e-3,)) if wrong else call

    monkeypatch.setattr(encoder, "usable", lambda name: "reference")
    monkeypatch.setattr(Encoder, "build", build)
    code, content = run(tiny, tmp_path, "--arms", "ours", *EACH)
    assert code == 1
    assert [row["status"] for row in content["rows"]] == ["ok", "failed", "ok"]
    assert not {"samples", "speedup"} & content["rows"][1].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--placements", "ffn,kv"], "placements must be among"),
        (["--placements", "ffn", "--placements", "attention,attention_kv"], "not hold both"),
        (["--placements", ""], "at least one"),
        (["--placements", "attention_kv", "--scope", "sublayer"], "placements must be ffn"),
    ],
)
def test_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        speed_vs_k.main([*arguments, "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def speedup(over: float) -> dict:
    return {"hf-sdpa": dict.fromkeys(("q1", "median", "q3"), over)}


def test_rows_of_older_files_are_of_the_ffn() -> None:
    row = {"arm": "ours", "k": 4, "status": "ok"}
    new = {**row, "placements": ["ffn", "attention_kv"]}
    assert results.pick([new, row], placements=["ffn"]) == [row]
    assert results.placements(row) == "ffn"
    assert results.placements(new) == "ffn + attention_kv"
