"""What a run is known by: the files that it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from variator_kernels.train import Job
from variator_kernels.train.output import digest, finished, of_folder, settings_of, write


def filled(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


WHOLE = ("config.json", "model.safetensors", "vocab.txt", "spiece.model", "modeling_x.py")


@pytest.mark.parametrize("name", [*WHOLE, "tokenizer.json", "0_Transformer/model.safetensors"])
def test_every_part_of_a_model_counts(tmp_path, name):
    filled(tmp_path, *WHOLE)
    before = of_folder(tmp_path)
    filled(tmp_path, name)
    (tmp_path / name).write_text("other")
    assert of_folder(tmp_path) != before


@pytest.mark.parametrize(
    "name", ["eval.json", "trainer_state.json", "README.md", "checkpoint-5/model.safetensors"]
)
def test_reports_and_checkpoints_do_not(tmp_path, name):
    before = of_folder(filled(tmp_path, *WHOLE))
    assert of_folder(filled(tmp_path, name)) == before


def test_names_of_a_hub_and_folders_of_data_have_none(tmp_path):
    assert of_folder(Path("bert-base-uncased")) is of_folder(Path()) is of_folder(tmp_path) is None
    assert digest(str(filled(tmp_path, "train.jsonl"))) is digest("sst2") is digest(None) is None


def settings(output: Path, plugins: Path) -> dict:
    job = Job(
        "pretrain", str(output.parent / "model"), "text.txt", str(output), plugins=str(plugins)
    )
    return settings_of(job, {})


def test_a_run_may_go_on_from_plugins_in_its_own_output(tmp_path):
    filled(tmp_path / "model", *WHOLE)
    output = filled(tmp_path / "output", "plugins.safetensors", "plugins.json")
    write(output / "run.json", settings(output, output))
    (output / "plugins.safetensors").write_text("trained")
    assert finished(output, settings(output, output), (Job,)) is None
    write(output / "metrics.json", {"eval_loss": 1.0})
    assert finished(output, settings(output, output), (Job,)) == {"eval_loss": 1.0}


def test_what_an_older_version_did_not_note_is_let_be(tmp_path):
    filled(tmp_path / "model", *WHOLE)
    plugins, output = filled(tmp_path / "plain", "plugins.safetensors"), tmp_path / "output"
    output.mkdir()
    noted = settings(output, plugins)
    del noted["sha256"]["model"]
    write(output / "run.json", noted)
    (tmp_path / "model" / "model.safetensors").write_text("other")
    assert finished(output, settings(output, plugins), (Job,)) is None
    (plugins / "plugins.safetensors").write_text("other")
    with pytest.raises(ValueError, match="holds a run whose plugins had another content"):
        finished(output, settings(output, plugins), (Job,))
