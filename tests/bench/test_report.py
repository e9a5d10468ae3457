"""The documentation's blocks and the targets, from made-up results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import targets
from bench.harness import results
from bench.harness.results import Row
from bench.tools import report

README = "# Title\n\n<!-- bench:{} -->\n{}<!-- /bench -->\n\nEnd.\n"


def row(case: str, arm: str, k: int | None, over: dict[str, float], **more: object) -> Row:
    speedup = {name: dict.fromkeys(("q1", "median", "q3"), v) for name, v in over.items()}
    values = {"dtype": "fp32", "batch": 8, "length": 512, "padding": "none", "tokens": 4096}
    numbers = {"median": 0.1, "samples": [0.1, 0.2], "ns_per_token": 10.0, "bound": 3.65}
    names = {"case": case, "arm": arm, "k": k, "status": "ok", "speedup": speedup}
    return {**values, **numbers, **names, **more}


def result(rows: list[Row]) -> Row:
    return {
        "schema": 1,
        "machine": {"cpu": "A CPU", "cores": 2, "kernels_isa": "avx2"},
        "model": {"name": "t5-base", "weights": "random"},
        "settings": {"threads": 2, "batch": 8, "length": 512, "dtype": ["fp32"]},
        "versions": {"torch": "2", "transformers": "5"},
        "git": {"commit": "0123456789", "dirty": False},
        "rows": rows,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        row("sublayer", "ours", 4, {"dense-packed": 3.6}),
        row("sublayer", "reference", 4, {"dense-packed": 3.0}),
        row("encoder", "ours", 4, {"hf-sdpa": 1.5}),
        row("ragged", "ours", 4, {}),
        row("ragged", "ours", 4, {}, padding="ragged", tokens=2048, samples=[0.05, 0.1]),
    ]
    (tmp_path / "results" / "a-cpu").mkdir(parents=True)
    (tmp_path / "results" / "a-cpu" / "speed_vs_k.json").write_text(json.dumps(result(rows)))
    return tmp_path


def run(folder: Path, text: str, *more: str) -> tuple[int, str]:
    readme = folder / "README.md"
    readme.write_text(text)
    arguments = ["--results", str(folder / "results"), str(readme)]
    return report.main([*arguments, *more]), readme.read_text()


def test_rewrites_then_is_up_to_date(folder: Path) -> None:
    code, text = run(folder, README.format("sublayer", "old\n"))
    assert code == 0
    assert "| fp32 | 4 | 3.65 | 3.00 |  | 3.60 |  |" in text and "old" not in text
    assert text.startswith("# Title\n\n") and text.endswith("\n\nEnd.\n")
    assert run(folder, text, "--check") == (0, text)


def test_check_finds_stale_and_writes_nothing(folder: Path) -> None:
    stale = README.format("sublayer", "old\n")
    assert run(folder, stale, "--check") == (1, stale)


@pytest.mark.parametrize("name", report.TABLES)
def test_every_block_renders(folder: Path, name: str) -> None:
    code, text = run(folder, README.format(name, ""))
    assert code == 0
    assert run(folder, text, "--check")[0] == 0
    assert str(folder) not in text


@pytest.mark.parametrize(
    "text", [README.format("nothing", ""), "<!-- bench:sublayer -->\nno end\n"]
)
def test_broken_blocks_are_errors(folder: Path, text: str) -> None:
    with pytest.raises(SystemExit):
        run(folder, text)


def test_targets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "results" / "a-cpu" / "speed_vs_k.json"
    found = {t.text: (v, verdict) for t, v, verdict in targets.verdicts(results.read(path)["rows"])}
    over = "speed-up over"
    assert found[f"FFN sublayer, fp32, k=4: {over} dense with packed weights"] == (3.6, "met")
    assert found[f"whole encoder, fp32, k=4: {over} Hugging Face SDPA"] == (1.5, "missed")
    assert found["ragged batch, fp32, k=4: time a real token, over the full batch's"] == (
        1.0,
        "met",
    )
    assert found[f"FFN sublayer, bf16, k=4: {over} dense with packed weights"][1] == "not measured"
    assert targets.main([str(path)]) == 1
    assert "missed" in capsys.readouterr().out


def test_a_failed_row_counts_for_nothing() -> None:
    failed = {"case": "sublayer", "dtype": "fp32", "arm": "ours", "k": 4, "status": "failed"}
    verdicts = targets.verdicts([failed])
    assert {verdict for _, _, verdict in verdicts} == {"not measured"}


def test_targets_match_the_issue() -> None:
    assert targets.SUBLAYER["fp32"] == {2: 1.9, 4: 3.5, 8: 6.2, 16: 9.5, 32: 13.0}
    assert targets.SUBLAYER["bf16"] == {2: 1.85, 4: 3.4, 8: 6.0, 16: 9.3, 32: 12.5}
    assert targets.ENCODER == {"fp32": 1.85, "bf16": 1.5}


def test_every_run_of_methods(folder: Path) -> None:
    content = result([]) | {"task": "sst2", "score": "accuracy"}
    content["settings"] |= {"steps": 600, "batch": 16, "seeds": 3}
    made = {"method": "plugins", "setting": "k=4", "dev": 0.88, "test": None, "seeds": 3}
    made |= {"added": 0.01, "multiply_adds": 0.5, "speedup": {"median": 1.5}, "status": "ok"}
    made |= {"weights_bytes": 2**20, "peak_bytes": 2**21}
    content["summary"] = [made, made | {"method": "student", "status": "failed"}]
    path = folder / "results" / "a-cpu" / "methods_minilm_sst2.json"
    path.write_text(json.dumps(content))
    _, text = run(folder, README.format("methods", ""))
    assert "600 steps of 16 rows, medians of 3 seeds" in text
    assert "| plugins | k=4 | 88.0 |" in text and "student" not in text
    assert "methods_minilm_sst2.png" in text
