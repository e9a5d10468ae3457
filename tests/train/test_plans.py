"""Training the levels of plans: all of them in one run, and nothing else."""

import json

import pytest

from tests.train.test_placements import command, plugins
from variator_kernels.runtime.plan import Plan
from variator_kernels.runtime.site import Site

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SITES = tuple(Site(place, layer) for place in ("ffn", "attention_kv") for layer in (0, 1))


def plan(*ratios, sites=SITES):
    return Plan(sites, ratios, "cost", 0.5, "flops", 0.5, 0.5, 0.1)


def saved(folder, **plans):
    folder.mkdir(exist_ok=True)
    paths = []
    for name, made in plans.items():
        made.save(folder / f"{name}.json")
        paths.append(str(folder / f"{name}.json"))
    return paths


def moved(tensors):
    ends = ".merge.weight"
    return {
        name.removesuffix(ends) for name, x in tensors.items() if name.endswith(ends) and x.any()
    }


def test_trains_the_levels_of_all_plans(tmp_path):
    files = saved(tmp_path, fast=plan(4, 2, 4, 1), slow=plan(1, 2, 1, 1))
    out = command(
        tmp_path, "--plan", *files, "--ratios_per_step", "2",
        "--eval-data", str(tmp_path / "text.txt"),
    )  # fmt: skip
    settings, tensors = plugins(tmp_path)
    assert settings["placements"] == {"ffn": [2, 4], "attention_kv": [4]}
    assert settings["level"] == {"ffn": [4, 2], "attention_kv": [4, 1]}
    assert moved(tensors) == {"ffn.0.4", "ffn.1.2", "attention_kv.0.4"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 < metrics["eval_slow_loss"] < metrics["eval_fast_loss"]


def test_a_file_is_read_once(tmp_path, monkeypatch):
    (file,) = saved(tmp_path, only=plan(4, 1, 1, 1))
    read, load = [], Plan.load
    monkeypatch.setattr(Plan, "load", lambda path: read.append(path) or load(path))
    command(tmp_path, "--plan", file)
    assert read == [file]


def test_a_placement_may_be_dense_and_the_run_is_known_by_its_plans(tmp_path):
    (file,) = saved(tmp_path, only=plan(4, 1, 1, 1))
    command(tmp_path, "--plan", file)
    settings, tensors = plugins(tmp_path)
    assert settings["placements"] == {"ffn": [4], "attention_kv": [4]}
    assert moved(tensors) == {"ffn.0.4"}
    saved(tmp_path, only=plan(1, 4, 1, 1))
    with pytest.raises(ValueError, match="holds a run whose plans had another content"):
        command(tmp_path, "--plan", file)


def test_goes_on_from_plugins_of_more_ratios(tmp_path):
    first = command(tmp_path, "--ratios", "2,4,8", "--placements", "ffn,attention_kv")
    before = plugins(tmp_path)[1]
    first.rename(tmp_path / "first")
    (file,) = saved(tmp_path, half=plan(8, 2, 1, 1))
    command(tmp_path, "--plan", file, "--plugins", str(tmp_path / "first"))
    settings, after = plugins(tmp_path)
    assert settings["placements"] == {"ffn": [2, 4, 8], "attention_kv": [2, 4, 8]}
    changed = {name for name in before if not (before[name] == after[name]).all()}
    assert {name.split(".")[1] + "." + name.split(".")[2] for name in changed} == {"0.8", "1.2"}


REFUSED = [
    (("--ratios", "2"), "plans must not be given beside level, ratios and placements"),
    (("--level", '{"ffn": 2}'), "plans must not be given beside level"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_refuses_other_choices_beside(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        command(tmp_path, "--plan", *saved(tmp_path, a=plan(4, 1, 1, 1)), *more)


def test_refuses_plans_that_do_not_fit(tmp_path):
    dense, other = plan(1, 1, 1, 1), plan(2, 2, 2, sites=tuple(Site("ffn", i) for i in range(3)))
    good, same = plan(4, 1, 1, 1), saved(tmp_path / "more", a=plan(2, 1, 1, 1))
    with pytest.raises(ValueError, match="files of different names"):
        command(tmp_path, "--plan", *saved(tmp_path, a=good), *same)
    with pytest.raises(ValueError, match="other than 'dense'"):
        command(tmp_path, "--plan", *saved(tmp_path, dense=good))
    with pytest.raises(ValueError, match="level b must have a ratio above 1"):
        command(tmp_path, "--plan", *saved(tmp_path, a=good, b=dense))
    with pytest.raises(ValueError, match="a plan for the model's own sites"):
        command(tmp_path, "--plan", *saved(tmp_path, a=other))
    with pytest.raises(FileNotFoundError, match="path must be a plan's file"):
        command(tmp_path, "--plan", str(tmp_path / "none.json"))
