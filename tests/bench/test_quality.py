"""bench.quality_vs_k from end to end on a toy model; its figures mean nothing."""

import json
import shutil

import pytest
from matplotlib.axes import Axes

from bench import quality_vs_k
from bench.harness import results
from bench.quality import figure, originals, summary, tasks
from bench.quality.recipe import SEEDED, VARIANTS
from bench.quality.rivals import rivals
from bench.tools import report_training
from bench.tools.report_speed import Machine
from tests.train import toy

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("few_steps")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for name in ("sst2", "wikitext2"):
        (data / name).mkdir(parents=True)
    toy.table(data / "sst2" / "train.tsv", 60)
    toy.table(data / "sst2" / "dev.tsv", 30)
    for name in ("valid.txt", "test.txt"):
        toy.plain_text(data / "wikitext2" / name)
    words = tasks.TASKS["sst2"]._replace(labels=("bad", "good"))
    monkeypatch.setitem(tasks.TASKS, "sst2", words)
    quick = {"per_device_train_batch_size": 16, "max_steps": 3, "learning_rate": 1e-3}
    monkeypatch.setitem(originals.FINE_TUNING, "sst2", quick)
    toy.t5(tmp_path / "model")
    return tmp_path


def cost(k, q1, q3, status="ok"):
    return {"k": k, "status": status, "speedup": {"q1": q1, "median": (q1 + q3) / 2, "q3": q3}}


def test_a_ratio_pays_if_it_is_clearly_faster():
    costs = [cost(2, 1.3, 1.4), cost(4, 1.5, 1.6), cost(8, 1.55, 1.8), cost(16, 1.61, 1.7)]
    assert rivals(costs) == {2: None, 4: None, 8: 4, 16: None}  # 8 is no rival of 16
    assert rivals(costs[::-1]) == rivals(costs)
    assert rivals([cost(2, 1.3, 1.4), cost(4, 0, 0, "failed"), cost(8, 1.4, 1.5)]) == {
        2: None,
        8: 2,
    }
    assert rivals([]) == {}


def test_the_picture_goes_from_slow_to_fast(monkeypatch, tmp_path):
    """A line over k would run back where a larger k is slower."""
    lines = []
    plotted = Axes.plot

    def record(self, *arguments, **settings):
        if len(arguments) == 3 and arguments[2] == "o-":
            lines.append(arguments[0])
        return plotted(self, *arguments, **settings)

    monkeypatch.setattr(Axes, "plot", record)
    costs = [{**cost(k, s, s), "tokens_a_row": 25.2} for k, s in ((2, 1.3), (4, 1.7), (8, 1.6))]
    summary = [
        {"variant": "full", "k": row["k"], "speedup": row["speedup"]["median"], "accuracy": 0.8,
         "dense_accuracy": 0.9}
        for row in costs
    ]  # fmt: skip
    content = {"summary": summary, "costs": costs, "task": "sst2", "model": {"name": "toy"}}
    figure.quality(content, tmp_path / "picture.png")
    assert lines == [(1.3, 1.6, 1.7)]


def run(folder, *more, name="quality_vs_k_model_sst2"):
    arguments = ["--model", folder / "model", "--data", folder / "data", "--work", folder / "work"]
    arguments += ["--output", folder / "out", "--quick", "--rounds", "2", "--ratios", "2,4", *more]
    assert quality_vs_k.main([str(word) for word in arguments]) == 0
    return json.loads((folder / "out" / f"{name}.json").read_text())


@pytest.mark.slow
def test_runs_every_variant_and_goes_on_where_it_was(folder):
    content = run(folder, "--seeds", "2")
    expected = {
        (variant.name, k, seed)
        for variant in VARIANTS.values()
        for k in variant.ratios
        for seed in range(2 if variant.name in SEEDED else 1)
        if k in (2, 4)
    }
    assert {(row["variant"], row["k"], row["seed"]) for row in content["rows"]} == expected
    assert all(row["status"] == "ok" for row in content["costs"])
    assert 0 < content["costs"][1]["multiply_adds_left"] < 3
    assert (folder / "out" / "quality_vs_k_model_sst2.png").stat().st_size > 10_000
    made = Machine(folder / "out", {"quality_vs_k_model_sst2": content})
    for name, lines in (("quality", 2), ("ablation", len(VARIANTS)), ("calibration", 2)):
        header, _, *body = report_training.TABLES[name](made, folder).splitlines()
        assert len(body) == lines and {line.count("|") for line in body} == {header.count("|")}
    assert "quality_vs_k_model_sst2.png" in report_training.TABLES["quality-figure"](made, folder)
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*") if p.is_file()}
    again = run(folder, "--seeds", "2")
    assert again["rows"] == content["rows"]
    assert stamps == {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*") if p.is_file()}


def test_answers_a_test_set_if_there_is_one(folder):
    data = folder / "data" / "sst2"
    header, *rows = (data / "dev.tsv").read_text().splitlines()
    other = [row[:-1] + str(1 - int(row[-1])) for row in rows]
    (data / "test.tsv").write_text("\n".join([header, *other]) + "\n")
    for row in run(folder, "--variants", "untrained")["rows"]:
        assert row["test_accuracy"] == pytest.approx(1 - row["accuracy"])
        assert row["test_dense_accuracy"] == pytest.approx(1 - row["dense_accuracy"])
    (data / "test.tsv").unlink()
    content = run(folder, "--variants", "untrained")
    assert {row["test_accuracy"] for row in content["rows"]} == {None}
    assert {row["test_lost"] for row in content["summary"]} == {None}


def test_refuses_a_test_set_without_labels_before_it_trains(folder):
    (folder / "data" / "sst2" / "test.tsv").write_text("index\tsentence\n0\tw1 w2\n")
    with pytest.raises(ValueError, match="no column 'label'"):
        run(folder, "--variants", "untrained")
    assert not (folder / "work" / "sst2").exists()


def test_a_stage_that_was_killed_is_finished(folder):
    content = run(folder, "--variants", "without pre-training")
    stage = folder / "work" / "plugins" / "without-pre-training-seed0" / "sst2"
    plugins = (stage / "plugins.safetensors").read_bytes()
    for name in ("plugins.json", "plugins.safetensors", "answers.json"):
        (stage / name).unlink()
    shutil.rmtree(stage / "finish")
    assert run(folder, "--variants", "without pre-training")["rows"] == content["rows"]
    assert (stage / "plugins.safetensors").read_bytes() == plugins


def test_an_ablation_keeps_its_part_at_zero(folder):
    from safetensors.torch import load_file

    run(folder, "--variants", "mean pooling,copy")
    for name, part in (("mean-pooling", ".merge."), ("copy", ".adapter.w2")):
        path = folder / "work" / "plugins" / f"{name}-seed0" / "sst2" / "plugins.safetensors"
        tensors = load_file(path)
        frozen = {key for key in tensors if part in key}
        assert frozen and all(not tensors[key].any() for key in frozen)
        trained = ".adapter.w2" if part == ".merge." else ".merge.weight"
        assert all(tensors[key].any() for key in tensors if trained in key)


def test_refuses_answers_of_other_ratios(folder):
    run(folder, "--variants", "untrained")
    with pytest.raises(ValueError, match=r"work holds untrained of ratios \(2, 4\), now .* \(4,\)"):
        run(folder, "--variants", "untrained", "--ratios", "4")


def test_a_folder_keeps_to_its_recipe(folder, capsys, monkeypatch):
    run(folder, "--variants", "untrained")
    monkeypatch.setitem(originals.FINE_TUNING["sst2"], "learning_rate", 1e-2)
    with pytest.raises(SystemExit):
        run(folder, "--variants", "untrained")
    assert "holds stages made with another fine_tuning" in capsys.readouterr().err


def test_refuses_what_it_does_not_know(folder, capsys):
    wrong = (
        (["--variants", "x"], "variants must be of"),
        (["--model", "x"], "folder"),
        (["--placements", "keys"], "placements must be among"),
        (["--placements", "attention,attention_kv"], "not hold both"),
        (["--keep-first", "-1"], "keep_first must be integers >= 0"),
    )
    for more, message in wrong:
        with pytest.raises(SystemExit):
            run(folder, *more)
        assert message in capsys.readouterr().err


PLACED = "quality_vs_k_model_sst2_ffn_attention_kv_keep1"


def test_placements_are_kept_apart(folder):
    plain = run(folder, "--variants", "untrained")
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*") if p.is_file()}
    more = ("--placements", "attention_kv,ffn", "--keep-first", "1")
    placed = run(folder, "--variants", "untrained,without pre-training", *more, name=PLACED)
    assert placed["settings"]["placements"] == ["ffn", "attention_kv"]
    assert placed["settings"]["keep_first"] == 1
    for row in placed["rows"]:
        assert row["placements"] == ["ffn", "attention_kv"]
    assert {tuple(row["placements"]) for row in plain["rows"]} == {("ffn",)}
    for few, many in zip(placed["costs"], plain["costs"], strict=True):
        assert few["multiply_adds_left"] != many["multiply_adds_left"]
        assert few["status"] == "ok" and few["error"] <= few["allowed"]
    untrained = [results.pick(c["summary"], variant="untrained", k=4)[0] for c in (placed, plain)]
    assert untrained[0]["loss"] != untrained[1]["loss"]
    assert untrained[0]["added_over_ffn"] > untrained[1]["added_over_ffn"]
    (made,) = (folder / "work" / "plugins").glob("**/sst2/plugins.json")
    stage = made.parent.relative_to(folder / "work" / "plugins")
    assert str(stage) == "ffn_attention_kv_keep1/without-pre-training-seed0/sst2"
    settings = json.loads(made.read_text())
    assert settings["placements"] == {"ffn": [4], "attention_kv": [4]}
    assert settings["keep_first"] == 1
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    machine = Machine(folder / "out", {"quality_vs_k_model_sst2": plain, PLACED: placed})
    assert "sst2_ffn" not in report_training.TABLES["quality-figure"](machine, folder)
    lines = report_training.TABLES["ablation"](machine, folder)
    assert "| model, sst2, ffn + attention_kv, first 1 kept | untrained |" in lines
    assert (folder / "out" / f"{PLACED}.png").stat().st_size > 10_000


def test_one_command_compares_placements_and_kept_tokens(folder, capsys):
    """And goes on where it was: a second one makes nothing again."""
    more = ("--variants", "untrained,without pre-training", "--ratios", "4", "--keep-first", "0,1")
    places = ("attention_kv", "attention")
    for where in places:
        more += ("--placements", where)
    labels = [f"{place}_keep{kept}" for place in places for kept in "01"]
    first = run(folder, *more, name=f"quality_vs_k_model_sst2_{labels[0]}")
    for label in labels:
        content = json.loads((folder / "out" / f"quality_vs_k_model_sst2_{label}.json").read_text())
        assert "_".join(content["settings"]["placements"]) in label
        assert label.endswith(f"keep{content['settings']['keep_first']}")
        assert {row["status"] for row in content["costs"]} == {"ok"}
    shown = " ".join(capsys.readouterr().out.split())
    assert "medians over seeds" in shown
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*") if p.is_file()}
    again = run(folder, *more, name=f"quality_vs_k_model_sst2_{labels[0]}")
    assert again["rows"] == first["rows"]
    assert stamps == {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*") if p.is_file()}


def test_keys_alone_have_no_adapter_to_ablate(folder, capsys):
    more = ("--placements", "attention_kv")
    for wrong in ("copy", "r=40"):
        with pytest.raises(SystemExit):
            run(folder, "--variants", wrong, *more)
        assert "variants must be of" in capsys.readouterr().err
    args = quality_vs_k.parser().parse_args(more)
    names = [variant.name for variant, _ in quality_vs_k.chosen(args, args.placements[0])]
    assert "mean pooling" in names and not {"copy", "r=40"} & set(names)


def test_targets_of_the_placements():
    def content(*placements, model="minilm", **more):
        settings = {"placements": list(placements), **more} if placements else {}
        return {"model": {"name": model}, "task": "sst2", "settings": settings}

    assert summary.targets(content())[4] == summary.targets(content("ffn"))[4] == 1.3
    assert summary.targets(content("attention_kv")) == {4: 1.0}
    assert summary.targets(content("ffn", "attention_kv", keep_first=0)) == {4: 1.8}
    assert summary.targets(content("attention")) == {}
    assert summary.targets(content("ffn", model="other")) == {}
