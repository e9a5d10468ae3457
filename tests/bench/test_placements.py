"""The placements in the benchmarks: beside one another in one run, each against its own truth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import variator_kernels as vk
from bench import speed_vs_k, targets
from bench.cases import Key, encoder, models
from bench.cases.encoder import Encoder
from bench.harness import options, results
from bench.tools import report
from bench.tools.report_speed import Machine
from tests.bench.conftest import BERT, one_ffn
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
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "screen", lambda: Console(width=300))
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
    with pytest.raises(ValueError, match=r"length must be at most 40, the positions of .*, got 41"):
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


def row(model: str, over: float, placements: list[str] | None, **more: object) -> results.Row:
    """Of the encoder; of an older file without placements."""
    speedup = {"hf-sdpa": dict.fromkeys(("q1", "median", "q3"), over)}
    values = {"case": "encoder", "arm": "ours", "k": 4, "status": "ok", "dtype": "fp32"}
    values |= {"model": model, "batch": 8, "length": 512, "median": 0.5, "bound": 2.6}
    return {**values, "speedup": speedup, **more} | (
        {} if placements is None else {"placements": placements}
    )


BOTH, NONE = ["ffn", "attention_kv"], "not measured"


def test_targets_are_of_their_placements_model_and_size() -> None:
    rows = [
        row("bert-base", 9, ["ffn"]),
        row("t5-base", 8, ["ffn"], length=128),
        row("t5-base", 2.5, BOTH),
        row("t5-base", 7, ["attention"]),
        row("bert-base", 2.3, BOTH),
        row("t5-base", 1.9, None),
    ]
    found = {target.text: (value, verdict) for target, value, verdict in targets.verdicts(rows)}
    over = "k=4: speed-up over Hugging Face SDPA"
    assert found[f"whole encoder, fp32, {over}"] == (1.9, "met")
    assert found[f"t5-base, ffn + attention_kv, 8 x 512, fp32, {over}"] == (2.5, "met")
    assert found[f"bert-base, ffn + attention_kv, 8 x 512, fp32, {over}"] == (2.3, "missed")
    for name in ("t5-base", "bert-base"):
        wide = found[f"{name}, ffn + attention_kv, 1 x 2048, fp32, {over}"]
        assert wide == (None, NONE)


def test_never_slower_than_the_ffn_alone() -> None:
    """The least over all inputs from 128 tokens up, of every file."""

    def beside(over: float, length: int, **more: object) -> results.Row:
        made = row("t5-base", 2, BOTH, batch=1, length=length, **more)
        made["speedup"]["ours, ffn"] = dict.fromkeys(("q1", "median", "q3"), over)
        return made

    rows = [beside(0.8, 64), beside(1.1, 128), beside(1.05, 512)]
    text = "ffn + attention_kv, fp32, from 128 tokens: least speed-up over ffn alone"
    for more, expected in ([], (1.05, "met")), ([beside(9, 128, status="failed")], (None, NONE)):
        found = [(v, verdict) for t, v, verdict in targets.verdicts(rows + more) if t.text == text]
        assert found == [expected]


def test_a_table_of_every_file_with_placements(tmp_path: Path) -> None:
    new, dense = row("bert-base", 2.3, BOTH), row("bert-base", 1, [], arm="hf-sdpa", k=None)
    new["speedup"]["ours, ffn"] = dict.fromkeys(("q1", "median", "q3"), 1.25)
    one = [dense, row("bert-base", 1.7, ["ffn"]), new]
    files = {"speed_vs_k": [row("t5-base", 1.8, None)], "bert": one, "memory": [{"case": "memory"}]}
    here = {"cpu": "A", "family": "6", "model": "1", "kernels_isa": "avx2"}
    common = {"machine": here, "settings": {"threads": 2}}
    found = Machine(tmp_path, {name: {"rows": rows, **common} for name, rows in files.items()})
    where, _, _, _, *lines = report.TABLES["placements"](found, tmp_path).splitlines()
    assert where == "A (family 6, model 1), 2 threads, kernels avx2:"
    assert lines == [
        "| bert-base | 8 x 512 | fp32 | 4 | ffn | 0.50 | 1.70 |  | 2.60 |",
        "| bert-base | 8 x 512 | fp32 | 4 | ffn + attention_kv | 0.50 | 2.30 | 1.25 | 2.60 |",
    ]
    assert "bert" not in report.TABLES["encoder"](found, tmp_path)


@one_ffn
def test_a_name_for_the_result(tiny: str, tmp_path: Path) -> None:
    run(tiny, tmp_path, "--arms", "hf")
    (tmp_path / "speed_vs_k.json").rename(tmp_path / "before")
    more = ["--model", tiny, "--output", str(tmp_path), "--quick", "--dtype", "fp32"]
    speed_vs_k.main([*more, "--scope", "encoder", "--arms", "hf", "--name", "other"])
    assert (tmp_path / "other.json").is_file() and (tmp_path / "other.png").is_file()
    assert not (tmp_path / "speed_vs_k.json").exists()


def test_rows_of_older_files_are_of_the_ffn() -> None:
    old, new = row("t5-base", 1, None), row("t5-base", 1, BOTH)
    assert results.pick([new, old], placements=["ffn"]) == [old]
    assert results.placements(old) == "ffn"
    assert results.placements(new) == "ffn + attention_kv"
