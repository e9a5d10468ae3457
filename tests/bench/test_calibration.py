"""bench.calibration: errors on unseen text, by site and whole, and which tokens stay whole."""

from __future__ import annotations

import json

import pytest
import torch

import variator_kernels as vk
from bench import calibration
from tests.bench.test_plans import data, folder  # noqa: F401  (fixtures)
from tests.sites import tiny

SMALL = ("--paragraphs", "12,16", "--unseen", "6", "--length", "24", "--batch", "4",
         "--threads", "1")  # fmt: skip


def run(*arguments: object) -> int:
    return calibration.main([str(argument) for argument in arguments])


def test_a_row_a_case(folder, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(calibration, "in_child", calibration.measure)
    out = tmp_path / "out"
    kept = ("--kept", "none; first; first, largest")
    assert run("--model", folder, "--data", data, "--output", out, *kept, *SMALL) == 0
    content = json.loads((out / "calibration_bert.json").read_text())
    cases = [(row["paragraphs"], row["kept"], row["again"]) for row in content["rows"]]
    assert cases == [(12, "none", False), (12, "first", False), (12, "first, largest", False),
                     (16, "first", False), (12, "first", True)]  # fmt: skip
    for row in content["rows"]:
        places = [(error["k"], error["layer"]) for error in row["errors"]]
        assert places == [(k, layer) for k in (2, 4) for layer in (None, 0, 1)]
        whole, *alone = (error["before"] for error in row["errors"][:3])
        assert whole > max(alone) > 0 and row["seconds"] > 0 and row["tokens"] > 0
    shown = calibration.lines(content["rows"], "bert")
    assert len(shown) == 10 and not any(row["limit"] for row in shown)
    first = content["rows"][1]["errors"]
    ratios = [error["after"] / error["before"] for error in first if error["k"] == 2]
    assert shown[2]["worst"] == pytest.approx(max(ratios))
    assert content["rows"][4]["errors"] != first, "the second pass did something"


@pytest.mark.parametrize("fault", ["a dense level", "a worse ratio", "a worse first layer"])
def test_the_check_can_fail(folder, data, monkeypatch, fault):  # noqa: F811
    args = calibration.parser().parse_args(
        ["--model", str(folder), "--data", str(data), "--kept", "first", *SMALL]
    )
    cell = calibration.cells(args)[0]
    real = vk.calibrate

    def calibrate(model, batches, *levels):
        table = real(model, batches, *levels, passes=0)
        worse = {"a worse ratio": None, "a worse first layer": 0}.get(fault, -1)
        rows = [row._replace(after=2 * row.before) if row.layer == worse else row
                for row in table.rows]  # fmt: skip
        return table._replace(rows=tuple(rows))

    patch = vk.patch

    def patched(model, *settings, **more):
        if fault == "a dense level":
            with torch.no_grad():
                model.encoder.layer[0].output.dense.bias[0] += 1
        return patch(model, *settings, **more)

    monkeypatch.setattr(vk, "calibrate", calibrate)
    monkeypatch.setattr(vk, "patch", patched)
    found = calibration.measure(cell)
    wanted = {
        "a dense level": "ratio 1 is not the dense model",
        "a worse ratio": "a ratio ends worse",
    }
    assert found["reason"] == wanted.get(fault, "")
    assert found["status"] == ("failed" if fault in wanted else "ok")


def test_targets_are_minilms(folder, data):  # noqa: F811
    row = {"status": "ok", "paragraphs": 64, "kept": "first", "again": False,
           "multiply_adds_left": {"2": 0.7},
           "errors": [{"k": 2, "layer": None, "before": 1.0, "after": 0.5}]}  # fmt: skip
    assert calibration.lines([row], "minilm")[0]["limit"] == 0.45
    assert calibration.lines([{**row, "paragraphs": 320}], "minilm")[0]["limit"] == 0.33
    assert calibration.lines([row], "other")[0]["limit"] is None
    assert calibration.lines([{**row, "again": True}], "minilm")[0]["limit"] is None


def test_tokens_with_large_outputs_are_found(monkeypatch):
    """An embedding in the place of an FFN's last layer: its rows are the outputs."""
    model = tiny.model("bert", "gelu")
    outputs = model.embeddings.word_embeddings
    monkeypatch.setattr(calibration.internals, "ffn_outputs", lambda model: [outputs])
    ids = torch.arange(2, 23).repeat(30, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        outputs.weight[:] = 1.0
        outputs.weight[2] = 90.0  # the first of every row
        assert calibration.largest(model, [batch]) == []
        outputs.weight[[7, 11]] = torch.tensor([[10.0], [2.5]])
        assert calibration.largest(model, [batch]) == [7]
    few = {"input_ids": ids[:5], "attention_mask": batch["attention_mask"][:5]}
    assert calibration.largest(model, [few]) == [], "rare ids tell nothing"


def test_data_that_is_not_there(folder, tmp_path, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        run("--model", folder, "--data", tmp_path / "none")
    assert "data must hold wikitext2/" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--model", folder, "--kept", "everything")
    assert "kept must be of" in capsys.readouterr().err
