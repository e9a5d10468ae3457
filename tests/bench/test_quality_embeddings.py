"""bench.quality_vs_k --task embeddings: its measures, and all of it on a toy model."""

import json
import random
import shutil

import numpy as np
import pytest

import variator_kernels as vk
from bench import quality_vs_k
from bench.cases import models
from bench.harness import results
from bench.quality import embedders, embeddings, similarity, speed
from bench.tools import report_training
from bench.tools.report_speed import Machine
from tests.train import toy

pytest.importorskip("scipy")
pytest.importorskip("sentence_transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("few_steps")]


def random_rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_what_is_the_same_up_to_length_is_perfect():
    rows = random_rows(40, 6)
    found = similarity.compare(rows * np.linspace(0.5, 3, 40)[:, None], rows.astype(np.float32))
    assert found == pytest.approx(dict.fromkeys(found, 1.0), abs=1e-6)
    assert set(found) == set(embeddings.METRICS)


def test_turning_the_space_leaves_what_compares_pairs():
    turn, _ = np.linalg.qr(random_rows(6, 6, seed=1))
    rows = random_rows(40, 6)
    found = similarity.compare(rows @ turn, rows)
    assert found["spearman"] == pytest.approx(1) and found["neighbours"] == 1
    assert found["cosine"] < 0.9 and found["cosine_q05"] < found["cosine"]


def test_measures_against_plain_loops():
    a, b = random_rows(14, 5), random_rows(14, 5, seed=1)
    found = similarity.compare(a, b, neighbours=3)

    def cosine(x, y):
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    cosines = sorted(cosine(x, y) for x, y in zip(a, b, strict=True))
    assert found["cosine"] == pytest.approx(sum(cosines) / 14)
    assert found["cosine_q05"] == pytest.approx(cosines[0] + 0.65 * (cosines[1] - cosines[0]))
    ranks, kept = [], 0
    for rows in (a, b):
        pairs = [cosine(rows[i], rows[j]) for i in range(14) for j in range(i)]
        ranks.append(np.argsort(np.argsort(pairs)))
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    for i in range(14):
        near = []
        for rows in (a, b):
            others = sorted(
                (j for j in range(14) if j != i), key=lambda j: -cosine(rows[i], rows[j])
            )
            near.append(set(others[:3]))
        kept += len(near[0] & near[1])
    assert found["neighbours"] == pytest.approx(kept / 42)


def test_refuses_fewer_texts_than_neighbours():
    with pytest.raises(ValueError, match="texts must be more than 10, got 10"):
        similarity.compare(random_rows(10, 3), random_rows(10, 3))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    toy.table(tmp_path / "data" / "sst2" / "dev.tsv", 30)
    (tmp_path / "data" / "wikitext2").mkdir()
    for seed, name in enumerate(("valid.txt", "test.txt")):
        lines = []
        for i, text in enumerate(toy.sentences(88, 26, 40, seed=seed)):
            lines += [f" = Article {i} = "] if i % 4 == 0 else []
            lines.append(f" {text} ")
        (tmp_path / "data" / "wikitext2" / name).write_text("\n".join(lines) + "\n")
    toy.embedder(tmp_path / "model", "mean")
    return tmp_path


def arguments(folder, *more):
    given = ["--task", "embeddings", "--model", folder / "model", "--data", folder / "data"]
    given += ["--work", folder / "work", "--output", folder / "out", "--quick", "--rounds", "2"]
    return [str(word) for word in [*given, *more]]


def run(folder, *more):
    assert quality_vs_k.main(arguments(folder, *more)) == 0
    return json.loads((folder / "out" / "quality_embeddings_model.json").read_text())


@pytest.mark.slow
def test_makes_measures_and_reports_every_variant(folder):
    content = run(folder)
    kinds = ("paragraphs", "sst2")
    expected = {
        (kind, variant, kept, k)
        for kind in kinds
        for variant in embedders.VARIANTS
        for kept in ("none", "first 1")
        for k in (2, 4)
    }
    for rows in (content["rows"], content["summary"]):
        found = [(row["text"], row["variant"], row["kept"], row["k"]) for row in rows]
        assert set(found) == expected and len(found) == len(expected)
    assert len(content["costs"]) == 2 * 2 * 2
    assert all(row["status"] == "ok" and row["speedup"] for row in content["costs"])
    assert content["texts"] == {"paragraphs": 20, "sst2": embeddings.QUICK}
    assert all(-1 <= row[name] <= 1 for row in content["rows"] for name in embeddings.METRICS)
    assert (folder / "out" / "quality_embeddings_model.png").stat().st_size > 10_000
    made = Machine(folder / "out", {"quality_embeddings_model": content})
    header, _, *body = report_training.TABLES["embeddings"](made, folder).splitlines()
    assert len(body) == len(expected) and {x.count("|") for x in body} == {header.count("|")}
    assert "quality_embeddings_model.png" in report_training.TABLES["embeddings-figure"](
        made, folder
    )
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*") if p.is_file()}
    assert run(folder)["rows"] == content["rows"]
    assert stamps == {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*") if p.is_file()}


def test_compares_plugins_that_are_given(folder):
    """Two folders of one label are two seeds; what they keep and their bottleneck are their own."""
    model = embedders.load(folder / "model")
    for seed in range(2):
        vk.patch(model, 2, (2, 4, 8), 4 if seed else 6, keep_first=2, keep_last=1, keep=[7])
        random.seed(seed)
        models.fill(model, 0)
        vk.save_plugins(model, folder / f"p{seed}")
        vk.unpatch(model)
    shutil.copytree(folder / "p0", folder / "again")
    given = [f"mine={folder / 'p0'}", f"mine={folder / 'again'}", folder / "p1"]
    content = run(folder, "--variants", "", "--plugins", *given, "--ratios", "8")
    seen = {(r["variant"], r["kept"], r["bottleneck"], r["seeds"]) for r in content["summary"]}
    kept = "first 2; last 1; ids 7"
    assert seen == {("mine", kept, 6, 2), ("p1", kept, 4, 1)}
    assert len(content["summary"]) == 4 and {row["k"] for row in content["summary"]} == {8}
    texts = embeddings.measured(folder / "data", quick=True)["sst2"]
    dense = model.encode(texts)
    vk.load_plugins(model, folder / "p1")
    vk.set_ratio(model, 8)
    expected = similarity.compare(model.encode(texts), dense)
    (row,) = results.pick(content["rows"], variant="p1", text="sst2")
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_placements_are_kept_apart(folder):
    """Given plugins of other placements stand beside them, with a cost of their own."""
    model = embedders.load(folder / "model")
    vk.patch(model, 2, (2, 4), keep_first=1, placements=("attention_kv",))
    vk.save_plugins(model, folder / "keys")
    more = ("--variants", "untrained,trained", "--keep-first", "1", "--placements", "ffn,attention")
    assert quality_vs_k.main(arguments(folder, *more, "--plugins", str(folder / "keys"))) == 0
    path = folder / "out" / "quality_embeddings_model_ffn_attention.json"
    content = json.loads(path.read_text())
    found = {(r["variant"], results.placements(r), r["kept"]) for r in content["summary"]}
    assert found == {
        ("untrained", "ffn + attention", "first 1"),
        ("trained", "ffn + attention", "first 1"),
        ("keys", "attention_kv", "first 1"),
    }
    (cost, other) = (
        results.pick(content["summary"], variant=name, k=4, text="sst2")[0]["multiply_adds_left"]
        for name in ("untrained", "keys")
    )
    assert other < 1 < cost  # r is 64 here, and d 16
    made = {path.parent.name for path in (folder / "work" / "embeddings").glob("*/plugins.json")}
    assert made == {f"ffn_attention-{name}-keep1-seed0" for name in ("untrained", "trained")}


def test_a_row_that_is_not_right_has_no_time(folder, monkeypatch):
    real = speed.check
    monkeypatch.setattr(speed, "check", lambda *args: real(*args)._replace(ok=args[-1] == 2))
    assert quality_vs_k.main(arguments(folder, "--variants", "untrained")) == 1
    content = json.loads((folder / "out" / "quality_embeddings_model.json").read_text())
    for row in content["summary"]:
        assert (row["speedup"] is not None) == (row["k"] == 2)


def test_refuses_what_cannot_run_before_it_makes_anything(folder, capsys):
    model = embedders.load(folder / "model")
    vk.save_plugins(vk.patch(model, 2, (2,)), folder / "two")
    toy.bert(folder / "plain")
    wrong = [
        (["--variants", "full"], "variants must be of ('untrained'"),
        (["--model", folder / "plain"], "must be minilm or a folder of sentence-transformers"),
        (["--plugins", folder / "none"], "plugins must be a folder, or label=folder"),
        (["--plugins", folder / "two"], "have no ratio 4: set --ratios"),
        (["--plugins", f"trained={folder / 'two'}"], "'trained' is a variant too"),
        (["--keep-first", "-1"], "keep_first must be integers >= 0"),
        (["--task", "sst2,nothing"], "tasks must be of"),
        (["--data", folder / "nowhere"], "there is no"),
    ]
    for more, message in wrong:
        with pytest.raises(SystemExit):
            run(folder, *more)
        assert message in capsys.readouterr().err
        assert not (folder / "work").exists()


def test_stages_of_another_recipe_are_refused(folder, capsys):
    run(folder, "--variants", "untrained")
    path = folder / "work" / "embeddings" / "recipe.json"
    path.write_text(path.read_text().replace('"steps": 2', '"steps": 3'))
    with pytest.raises(SystemExit):
        run(folder, "--variants", "untrained")
    assert "holds stages made with another steps" in capsys.readouterr().err


def test_targets_are_of_what_was_trained_and_keeps_the_first_token():
    row = {"text": "paragraphs", "k": 2, "variant": "trained", "kept": "first 1"}
    content = {"model": {"name": "minilm"}}
    assert embeddings.target(content, row) == {
        "cosine": 0.98, "spearman": 0.98, "neighbours": 0.92
    }  # fmt: skip
    assert embeddings.target(content, row | {"text": "sst2"}) == {"spearman": 0.95}
    for other in ({"k": 4}, {"kept": "none"}, {"variant": "calibrated"}):
        assert embeddings.target(content, row | other) == {}
    assert embeddings.target({"model": {"name": "mine"}}, row) == {}
