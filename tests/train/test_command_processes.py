"""Runs that are killed, spread over processes or sharded end with the same plugins."""

import json
import random
import shutil
import signal
import time

import pytest
from safetensors.torch import load_file

from tests.train import toy
from tests.train.commands import TWO, command, finish, start
from variator_kernels.train.__main__ import main


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_plugins(folder, tmp_path):
    more = ["--max_steps", "120", "--save_steps", "6", "--logging_steps", "5", "--dropout"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(command(folder, whole, "pretrain", "text.txt", *more)))
    wait, kills, steps = random.Random(0), 0, []
    while kills < 2:
        run = start(command(folder, cut, "pretrain", "text.txt", *more))
        begun = max(steps, default=0)
        while run.poll() is None:
            steps = [int(p.name[11:]) for p in cut.glob("checkpoint-*")]
            if max(steps, default=0) > begun:
                break
            time.sleep(0.001)
        time.sleep(wait.uniform(0, 0.2))
        if run.poll() is not None:
            break
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills += 1
    assert kills >= 2, "the run was over before it could be killed"
    text = finish(start(command(folder, cut, "pretrain", "text.txt", *more)))
    assert text.count("train_runtime") == 1
    files = [path / "plugins.safetensors" for path in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [1, 2])
def test_two_processes_end_with_the_plugins_of_one(folder, tmp_path, shared):
    """The same global batch. Sums run in another order, and Adam divides small gradients by their
    own size: parameters may differ by 1 % of what training moved them, the losses by 1e-3."""
    more = ["--max_steps", "12", "--save_steps", "5", "--eval-data", str(folder / "text.txt")]
    more += ["--eval_steps", "6", "--learning_rate", "0.01", "--warmup_steps", "0"]
    more += ["--ratios_per_step", str(shared)]
    main(command(folder, tmp_path / "one", "pretrain", "text.txt", *more))
    spread = command(folder, tmp_path / "two", "pretrain", "text.txt", *more)
    spread[spread.index("--per_device_train_batch_size") + 1] = "4"
    finish(start(spread, *TWO))
    found = [load_file(tmp_path / name / "plugins.safetensors") for name in ("one", "two")]
    worst = max(float((found[1][key] - value).abs().max()) for key, value in found[0].items())
    assert worst < 12 * 0.01 * 0.01, "12 steps of at most 0.01"
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two")]
    for key in ("eval_k2_loss", "eval_k4_loss"):
        assert metrics[1][key] == pytest.approx(metrics[0][key], rel=1e-3)


@pytest.mark.slow
def test_shards_end_with_the_same_plugins(folder, tmp_path):
    more = ["--model", str(toy.bert(tmp_path / "bert")), "--ratios", "2", "4", "--max_steps", "6"]
    more += ["--save_steps", "4", "--eval-data", str(folder / "task.tsv")]
    more += ["--learning_rate", "0.01", "--warmup_steps", "0", "--ratios_per_step", "2"]
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    finish(start(command(folder, whole, "adapt", "task.tsv", *more), *TWO))
    layers = {"transformer_layer_cls_to_wrap": ["BertLayer"], "reshard_after_forward": False}
    layers = json.dumps(layers)
    more += ["--fsdp", "--fsdp_config", layers]
    sharded = command(folder, shards, "adapt", "task.tsv", *more)
    finish(start(sharded, *TWO, module="tests.train.sharded"))
    assert (shards / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file(), "it did not shard"
    files = [path / "plugins.safetensors" for path in (whole, shards)]
    wanted = files[0].read_bytes()
    assert files[1].read_bytes() == wanted
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (whole, shards)]
    assert metrics[1] == pytest.approx(metrics[0]) and "eval_k4_accuracy" in metrics[0]
    shutil.rmtree(shards / "checkpoint-6")
    for name in ("metrics.json", "plugins.safetensors"):
        (shards / name).unlink()
    again = finish(start(sharded, *TWO, module="tests.train.sharded"))
    assert "it goes on from checkpoint-4" in again
    assert files[1].read_bytes() == wanted
    runs = [json.loads((path / "run.json").read_text()) for path in (whole, shards)]
    assert runs[1] == runs[0] | {"fsdp": True, "output": str(shards)}
