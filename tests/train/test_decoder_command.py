"""The command line on decoders: plain text, then prompts with answers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import variator_kernels as vk
from tests.train import toy
from tests.train.commands import TWO, finish, start
from variator_kernels.train.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LEVEL = '{"ffn": {"1": 2}, "attention_kv": 4}'
SMALL = ["--bottleneck", "4", "--per_device_train_batch_size", "4", "--use_cpu"]
SMALL += ["--learning_rate", "0.02", "--warmup_steps", "0", "--disable_tqdm", "true"]
SMALL += ["--window", "8", "--keep-first", "2", "--logits_weight", "1", "--layer_weight", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("toy")
    toy.llama(made / "model")
    toy.plain_text(made / "text.txt", 100)
    toy.table(made / "task.tsv", labels=("bad", "good"))
    lines = [{"prompt": text, "answer": text[::-1]} for text in toy.sentences(20)]
    (made / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return made


def command(folder, output, step="pretrain", data="text.txt", *more):
    if step == "pretrain":
        more = ("--max-length", "48", "--level", LEVEL, *more)
    given = ["--model", str(folder / "model"), "--data", str(folder / data)]
    main([step, *given, "--output", str(output), *SMALL, "--max_steps", "6", *more])
    metrics = json.loads((output / "metrics.json").read_text())
    return json.loads((output / "plugins.json").read_text()), metrics


def test_pretrains_on_text_and_goes_on_where_it_stopped(folder, tmp_path):
    more = ["--save_steps", "2", "--eval-data", str(folder / "text.txt"), "--eval_steps", "3"]
    more += ["--calibrate", "12", "--key_rate", "2"]
    settings, metrics = command(folder, tmp_path / "a", "pretrain", "text.txt", *more)
    assert settings["level"] == {"ffn": [1, 2], "attention_kv": [4, 4]}
    assert (settings["window"], settings["keep_first"]) == (8, 2)
    state = json.loads((tmp_path / "a" / "checkpoint-6" / "trainer_state.json").read_text())
    history = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert history[1]["eval_mixed_divergence"] < history[0]["eval_mixed_divergence"]
    assert {"eval_dense_perplexity", "eval_mixed_perplexity", "eval_mixed_loss"} <= set(metrics)
    files = [tmp_path / name / "plugins.safetensors" for name in "ab"]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    for name in ("metrics.json", "plugins.safetensors"):
        (tmp_path / "b" / name).unlink()
    command(folder, tmp_path / "b", "pretrain", "text.txt", *more)
    assert files[0].read_bytes() == files[1].read_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    vk.load_plugins(model, tmp_path / "a")
    ids = torch.tensor([[1, *range(5, 40)]])
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, 41)


def test_calibrates_what_the_level_runs_alone(folder, tmp_path, caplog):
    command(folder, tmp_path, "pretrain", "text.txt", "--calibrate", "12")
    rows = [line.split() for line in caplog.text.splitlines() if " ffn " in line]
    assert {row[2] for row in rows} == {"1"}


@pytest.mark.slow
def test_two_processes_end_with_the_plugins_of_one(folder, tmp_path):
    """As encoders': parameters may differ by 1 % of what training moved them."""
    given = [
        "pretrain",
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "text.txt"),
        *SMALL,
    ]
    given += ["--max-length", "48", "--level", LEVEL, "--max_steps", "6", "--task_weight", "0.5"]
    given += ["--eval-data", str(folder / "text.txt")]
    main([*given, "--output", str(tmp_path / "one")])
    given[given.index("--per_device_train_batch_size") + 1] = "2"
    finish(start([*given, "--output", str(tmp_path / "two")], *TWO))
    found = [load_file(tmp_path / name / "plugins.safetensors") for name in ("one", "two")]
    worst = max(float((found[1][key] - value).abs().max()) for key, value in found[0].items())
    assert worst < 6 * 0.02 * 0.01
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two")]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-3)


def test_keys_alone_count_every_position(folder, tmp_path):
    level = ["--level", '{"attention_kv": 2}']
    first = command(folder, tmp_path / "a", "pretrain", "text.txt", *level)[0]
    assert first["placements"] == {"attention_kv": [2]}
    command(folder, tmp_path / "b", "pretrain", "text.txt", *level, "--continuation", "4")
    a, b = (load_file(tmp_path / name / "plugins.safetensors") for name in "ab")
    assert any(not torch.equal(a[key], b[key]) for key in a)


def test_several_ratios_share_a_step(folder, tmp_path):
    more = ["--placements", "attention_kv,ffn", "--ratios", "2", "4", "--ratios_per_step", "2"]
    given = ["--model", str(folder / "model"), "--data", str(folder / "text.txt"), *SMALL]
    output = tmp_path / "out"
    main(
        [
            "pretrain",
            *given,
            *more,
            "--output",
            str(output),
            "--max_steps",
            "2",
            "--max-length",
            "48",
        ]
    )
    tensors = load_file(output / "plugins.safetensors")
    assert all(value.any() for name, value in tensors.items() if name.endswith("merge.weight"))


def test_adapts_to_a_task(folder, tmp_path):
    command(folder, tmp_path / "plain")
    task = ["--template", "w1 w2 w3 w4 : {sentence} w5", "--labels", "bad,good"]
    task += ["--eval-data", str(folder / "task.tsv"), "--plugins", str(tmp_path / "plain")]
    task += ["--level", LEVEL, "--task_weight", "0.1", "--gradient_checkpointing", "True"]
    settings, metrics = command(folder, tmp_path / "task", "adapt", "task.tsv", *task)
    assert (settings["window"], settings["keep_first"]) == (8, 2)
    for name in ("dense", "mixed"):
        assert 0 <= metrics[f"eval_{name}_accuracy"] <= 1
    a, b = (load_file(tmp_path / name / "plugins.safetensors") for name in ("plain", "task"))
    assert any(not torch.equal(a[key], b[key]) for key in a)


def test_adapts_to_free_answers(folder, tmp_path):
    task = ["--text", "prompt", "--label", "answer", "--level", '{"ffn": 2}']
    more = ["--eval-data", str(folder / "chat.jsonl")]
    metrics = command(folder, tmp_path / "chat", "adapt", "chat.jsonl", *task, *more)[1]
    assert "eval_k2_perplexity" in metrics and "eval_k2_accuracy" not in metrics


@pytest.mark.parametrize(
    ("step", "data", "more", "message"),
    [
        (
            "pretrain",
            "text.txt",
            ["--vary-lengths"],
            "vary_lengths must not be given for a decoder",
        ),
        (
            "pretrain",
            "text.txt",
            ["--continuation", "0"],
            "continuation must be tokens >= 1, got 0",
        ),
        ("pretrain", "text.txt", ["--continuation", "40"], "max_length must be at least 49"),
        (
            "pretrain",
            "text.txt",
            ["--calibrate", "16", "--level", '{"attention_kv": 2}'],
            "calibrate must be 0 for a decoder without plugins for ffn",
        ),
        ("pretrain", "text.txt", ["--window", "-1"], "window must be >= 0, got -1"),
        (
            "pretrain",
            "text.txt",
            ["--level", '{"attention": 2}'],
            "placements must not hold 'attent",
        ),
        ("adapt", "task.tsv", ["--continuation", "4"], "continuation may be set in pretrain alone"),
        ("adapt", "task.tsv", ["--text", "sentence,label"], "text must name one column for a dec"),
        ("adapt", "task.tsv", ["--labels", "bad,w1"], "has the label 'good', it must be one of"),
        ("adapt", "task.tsv", ["--labels", "bad,good,bad"], "labels must each be the same tokens"),
    ],
)
def test_refusals(folder, tmp_path, step, data, more, message):
    with pytest.raises(ValueError, match=message):
        command(folder, tmp_path / "out", step, data, *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["window", "continuation"])
def test_encoders_have_none_of_it(tmp_path, name):
    toy.bert(tmp_path / "model")
    toy.plain_text(tmp_path / "text.txt")
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--use_cpu"]
    with pytest.raises(
        ValueError, match=f"{name} must be given for decoders alone, got 8 for .*bert"
    ):
        main(["pretrain", *given, f"--{name}", "8", "--output", str(tmp_path / "out")])
