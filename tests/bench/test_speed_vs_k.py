"""The main benchmark runs, writes what it should, and withholds what is not right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import plot, speed_vs_k
from bench.cases import Arm, Case, Key, models, sublayer
from bench.harness import checks, clock, runner
from tests.bench.conftest import one_ffn
from variator_kernels import extension

PLAIN = "hf,dense-packed,reference"
KERNELS = pytest.mark.skipif(extension.load() is None, reason="the kernels are not built")


def run(model: str, output: Path, *more: str) -> tuple[int, dict]:
    arguments = ["--model", model, "--output", str(output), "--quick", "--dtype", "fp32"]
    code = speed_vs_k.main([*arguments, *more])
    return code, json.loads((output / "speed_vs_k.json").read_text())


@one_ffn
def test_writes_json_and_png(tiny: str, tmp_path: Path) -> None:
    code, content = run(tiny, tmp_path, "--arms", PLAIN, "--ratios", "2,4", "--length", "37")
    assert code == 0
    assert (tmp_path / "speed_vs_k.png").read_bytes().startswith(b"\x89PNG")
    assert content["model"]["weights"] == "random"
    assert {"cpu", "cores", "isa"} <= content["machine"].keys()
    assert {"torch", "transformers", "python"} <= content["versions"].keys()
    assert {"commit", "dirty"} == content["git"].keys()
    assert {"freed_memory_kept", "large_pages"} == content["settings"]["allocator"].keys()
    rows = [row for row in content["rows"] if row["case"] == "sublayer"]
    assert [(r["arm"], r["k"]) for r in rows] == [
        ("hf", None),
        ("dense-packed", None),
        ("reference", 2),
        ("reference", 4),
    ]
    for row in rows:
        assert row["status"] == "ok" and row["error"] <= row["allowed"]
        assert len(row["samples"]) == content["settings"]["repeats"]
        assert row["q1"] <= row["median"] <= row["q3"]
        assert set(row["speedup"]) >= {"hf", "dense-packed"}
    assert plot.draw(content, tmp_path / "again.json").stat().st_size > 10_000


@KERNELS
def test_every_case(tiny: str, tmp_path: Path) -> None:
    code, content = run(
        tiny, tmp_path, "--arms", "hf,hf-sdpa,reference,ours", "--small", "--ragged", "--backward"
    )
    assert code == 0
    found = {row["case"] for row in content["rows"]}
    assert found == {"sublayer", "small", "ragged", "backward", "encoder"}
    assert all(row["status"] == "ok" for row in content["rows"])
    ragged = [row for row in content["rows"] if row["padding"] == "ragged"]
    assert ragged and all(row["tokens"] < row["batch"] * row["length"] for row in ragged)


def test_a_bert(tiny_bert: str, tmp_path: Path) -> None:
    arms = "hf,hf-sdpa,dense-packed,reference,ours"
    code, content = run(tiny_bert, tmp_path, "--arms", arms, "--ragged", "--backward")
    assert code == 0
    assert {row["case"] for row in content["rows"]} == {"sublayer", "ragged", "backward", "encoder"}
    assert {row["status"] for row in content["rows"]} <= {"ok", "skipped"}
    assert content["model"]["d_ff"] == 128 and content["model"]["weights"] == "random"


@one_ffn
def test_a_wrong_arm_has_no_number(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = sublayer.Sublayer.plugged

    def plugged(self, name, k, train=False):
        call = right(self, "reference", k, train)
        return (lambda x: call(x) + 1e-3) if name == "ours" else call

    monkeypatch.setattr(sublayer.Sublayer, "plugged", plugged)
    code, content = run(tiny, tmp_path, "--arms", "hf,reference,ours", "--scope", "sublayer")
    assert code == 1
    wrong = next(row for row in content["rows"] if row["arm"] == "ours")
    assert wrong["status"] == "failed" and wrong["error"] > wrong["allowed"]
    assert not {"samples", "median", "speedup"} & wrong.keys()
    assert all(row["status"] == "ok" for row in content["rows"] if row is not wrong)
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("late", [False, True], ids=["raises", "goes wrong while timed"])
def test_a_broken_arm_fails_alone(late: bool) -> None:
    measure = checks.truth((torch.zeros(3).double(),), (torch.zeros(3),))
    calls = iter(range(100))

    def broken() -> checks.Outputs:
        if not late:
            raise RuntimeError("no")
        return (torch.full((3,), float("nan") if next(calls) > 2 else 0.0),)

    sizes = ("forward", "t5-base", "fp32", 1, 3)
    case = Case("sublayer", "sublayer", *sizes, lambda key: measure)
    case.arms = [
        Arm(Key("hf"), lambda: lambda: (torch.zeros(3),), 3),
        Arm(Key("ours", 4), lambda: broken, 3),
    ]
    good, bad = runner.run(case, [clock.Wall()], 4, warmup=1)
    assert good["status"] == "ok" and "median" in good
    assert bad["status"] == "failed" and "median" not in bad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "t5-huge"], "model must be one of"),
        (["--arms", "hf,fast"], "got 'fast'"),
        (["--dtype", "int8"], "got 'int8'"),
        (["--ratios", "1,2"], "at least 2"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        speed_vs_k.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_weights_of_a_folder_are_used(tmp_path: Path) -> None:
    base = models.architecture("t5-base")
    config = type(base.config)(
        d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=1, vocab_size=50
    )
    made = models.encoder(models.Architecture("made", config, None), torch.float32)
    made.save_pretrained(tmp_path)
    model = models.architecture(str(tmp_path))
    assert model.weights == "from the folder"
    layer, _ = models.sublayer(model, torch.float32)
    expected = made.encoder.block[0].layer[-1].DenseReluDense.wi.weight
    assert torch.equal(layer.DenseReluDense.wi.weight, expected)


def test_judge_sees_shape_nan_and_size() -> None:
    exact = torch.ones(4, dtype=torch.double)
    measure = checks.truth((exact,), (torch.ones(4) + 1e-4,))
    assert measure.plain[0] == pytest.approx(1e-4, rel=1e-3)
    assert checks.judge((torch.ones(4) + 1.9e-4,), measure).ok
    assert checks.factor_of("ours-compiled") == checks.factor_of("cuda") < checks.factor_of("hf")
    for wrong in (torch.ones(4) + 3e-4, torch.ones(3), torch.full((4,), float("nan"))):
        assert not checks.judge((wrong,), measure).ok
    assert not checks.judge((), measure).ok


def test_timing_is_paired_and_interleaved() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples, _ = clock.Wall().interleave(calls, 5)
    assert all(sorted(order[i : i + 3]) == list("abc") for i in range(0, 15, 3))
    assert all(len(seconds) == 5 for seconds in samples.values())
    assert clock.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])["median"] == 2.0
