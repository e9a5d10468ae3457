"""bench.quality_vs_k: seeds of several runs, and a part of the recipe."""

import json

import pytest

from bench.harness import results
from bench.quality.recipe import Recipe
from tests.bench.test_quality import folder, pytestmark, run  # noqa: F401


def test_seeds_of_other_runs_count_too(folder, capsys):  # noqa: F811
    def more(seed, *arguments):
        seed_ = ("--seeds", "1", "--first-seed", str(seed))
        return run(folder, "--variants", "full", *seed_, *arguments)

    first = more(0)
    path = folder / "first.json"
    path.write_text(json.dumps(first))
    both = more(1, "--add", path)
    assert both["rows"][:2] == results.read(path)["rows"]
    assert [row["seed"] for row in both["rows"]] == [0, 0, 1, 1]
    assert {row["seeds"] for row in both["summary"]} == {2}
    (source,) = both["added"]
    assert source["machine"] == first["machine"] and source["git"] == first["git"]
    path.write_text(json.dumps(both))
    assert len(more(2, "--add", path)["added"]) == 2
    for seed, change, message in (
        (1, {}, "seed 1 of variant 'full' once more"),
        (2, {"settings": both["settings"] | {"batch": 3}}, "of another batch"),
        (2, {"task": "rte"}, "and this run makes"),
    ):
        path.write_text(json.dumps(both | change))
        with pytest.raises(SystemExit):
            more(seed, "--add", path)
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_share_of_the_recipe(folder, capsys):  # noqa: F811
    recipe = Recipe().lasting(0.1)
    assert (recipe.pretrain_steps, recipe.adapt_steps, recipe.finish_steps) == (10, 250, 300)
    assert Recipe().lasting(1e-9).adapt_steps == 1 and recipe.batch == Recipe().batch
    for wrong in ("0", "-1", "nan"):
        with pytest.raises(SystemExit):
            run(folder, "--share", wrong)
        assert "share must be a finite number > 0" in capsys.readouterr().err
