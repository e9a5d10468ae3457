"""bench.decoder.task from end to end on a toy decoder; its figures mean nothing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import variator_kernels as vk
from bench.decoder import answers, setup, task
from bench.decoder.levels import Level
from bench.harness import results
from tests.train import toy

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("few_steps")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    toy.table(tmp_path / "data" / "sst2" / "train.tsv", 60)
    toy.table(tmp_path / "data" / "sst2" / "dev.tsv", 40)
    toy.llama(tmp_path / "model")
    monkeypatch.setattr(answers, "LABELS", ("bad", "good"))
    return tmp_path


def asked(folder: Path) -> tuple[answers.Questions, int]:
    words = setup.tokenizer(setup.whole(str(folder / "model")))
    return answers.questions(answers.examples(folder / "data", "dev", words)), words.eos_token_id


def test_writes_what_is_lost(folder: Path) -> None:
    arguments = ["--model", folder / "model", "--data", folder / "data", "--work", folder / "work"]
    arguments += ["--quick", "--places", "ffn/2,attention_kv", "--ratios", "2", "--rounds", "1"]
    arguments = [*map(str, arguments), "--output", str(folder / "results")]
    assert task.main([*arguments, "--seeds", "2"]) == 0
    content = results.read(folder / "results" / "decoder_task_sst2_model.json")
    dense, *rows = content["rows"]
    assert [(row["where"], row["seed"]) for row in rows] == [
        ("ffn/2", 0), ("ffn/2", 1), ("attention_kv", 0), ("attention_kv", 1),
    ]  # fmt: skip
    assert dense["where"] == "" and "multiply_adds_left" not in dense
    for row in rows:
        assert row["status"] == "ok", row
        assert 0 <= row["dev"] <= 1 and row["speedup"]["median"] > 0 and "test" not in row
        assert 0.5 < row["multiply_adds_left"] < 1.5, "merges weigh much in a model of this size"
    assert [row["seeds"] for row in content["summary"]] == [1, 2, 2]
    made = folder / "work" / "plugins" / "ffn-2_k=2-seed0" / "plugins.safetensors"
    before = made.stat().st_mtime_ns
    assert task.main(arguments) == 0, "from the stages that are there"
    assert made.stat().st_mtime_ns == before
    assert task.main([*arguments, "--only", "attention_kv k=2"]) == 0
    content = results.read(folder / "results" / "decoder_task_sst2_model.json")
    assert [row["where"] for row in content["rows"]] == ["", "attention_kv"]
    with pytest.raises(SystemExit):
        task.main([*arguments, "--only", "attention_kv k=3"])
    with pytest.raises(SystemExit):
        task.main([*arguments, "--share", "0"])
    with pytest.raises(SystemExit):
        task.main([*(word for word in arguments if word != "--quick"), "--share", "0.5"])


@torch.no_grad()
@pytest.mark.parametrize("level", [Level(), Level("ffn", 2), Level("attention_kv", 2, 0)])
def test_a_batch_answers_as_generate_does(folder: Path, level: Level) -> None:
    found, pad = asked(folder)
    how = {"local_files_only": True, "dtype": torch.float64}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **how).eval()
    if level.where:
        model = setup.patched(model, [2], level.window or 0)
        torch.manual_seed(1)
        for parameter in vk.plugin_parameters(model):
            parameter.normal_(0, 0.1)
        vk.set_ratio(model, level.ratio(2))
    right = 0
    for prompt, answer in zip(found.prompts, found.answers, strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=1, do_sample=False, pad_token_id=pad,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        choices = sorted(set(found.answers))
        right += choices[int(out.logits[0][0, choices].argmax())] == answer
    assert answers.answered_right(model, found.batches(pad)) == right / len(found.prompts)
    assert 0 < right < len(found.prompts)


def test_labels_must_begin_with_tokens_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "LABELS", ("not bad", "not good"))
    with pytest.raises(ValueError, match="must begin with 2 tokens"):
        asked(folder)
