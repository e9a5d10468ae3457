"""The command line: runs to the end, and refuses bad data in words."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel

from tests.train import toy
from tests.train.commands import command, start
from variator_kernels import patch, plugin_parameters, save_plugins
from variator_kernels.runtime.state import states
from variator_kernels.train import Job
from variator_kernels.train.__main__ import main
from variator_kernels.train.prepare import load, plugged

TASK = "sentence\tlabel\nw1\t0\n"


def test_attention_is_the_one_asked_for(folder):
    for wanted in ("eager", "sdpa"):
        job = Job("pretrain", str(folder / "model"), "text.txt", "unused", attention=wanted)
        assert load(job)[0].config._attn_implementation == wanted


def test_adapts_what_was_pretrained(folder, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    main(command(folder, first, "pretrain", "text.txt", "--max_steps", "3"))
    more = ["--plugins", str(first), "--max_steps", "40", "--learning_rate", "0.01"]
    more += ["--eval-data", str(folder / "task.tsv"), "--eval_steps", "20"]
    more += ["--task_weight", "0.1", "--layer_weight", "0.1"]
    main(command(folder, second, "adapt", "task.tsv", *more))
    metrics = json.loads((second / "metrics.json").read_text())
    state = json.loads((second / "checkpoint-40" / "trainer_state.json").read_text())
    history = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert history[1] < history[0]
    assert metrics["eval_loss"] == pytest.approx(history[1])
    assert 0 <= metrics["eval_k4_accuracy"] <= 1
    assert "eval_k2_accuracy" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds a run with seed=42, now it is 3"):
        main(command(folder, second, "adapt", "task.tsv", *more, "--seed", "3"))


def test_spliced_rows_train_and_leave_the_evaluation_alone(folder, tmp_path):
    more = ["--max_steps", "3", "--learning_rate", "0", "--logging_steps", "1"]
    more += ["--eval-data", str(folder / "task.tsv")]
    trained, evaluated = [], []
    for part in ("0", "1"):
        output = tmp_path / part
        main(command(folder, output, "adapt", "task.tsv", *more, "--splice", part))
        state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
        trained.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
        evaluated.append(json.loads((output / "metrics.json").read_text()))
    assert evaluated[0] == evaluated[1]
    assert all(a != b for a, b in zip(*trained, strict=True)) and len(trained[0]) == 3


def test_calibrates_before_the_first_step(folder, tmp_path, capsys):
    more = ["--max_steps", "2", "--learning_rate", "0", "--eval-data", str(folder / "text.txt")]
    losses = []
    for count in ("0", "40"):
        main(command(folder, tmp_path / count, "pretrain", "text.txt", *more, "--calibrate", count))
        losses.append(json.loads((tmp_path / count / "metrics.json").read_text())["eval_loss"])
        shown = capsys.readouterr()
        assert ("error before  after" in shown.out) == (count == "40"), "its table is shown"
        assert ("site/s" in shown.err) == (count == "40"), "and how far it is"
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("step", "name", "content", "more", "message"),
    [
        ("pretrain", "a.txt", "", [], "a.txt is empty"),
        ("pretrain", "a.txt", "w1 w2\n", [], "no paragraph of at least 8"),
        ("adapt", "a.tsv", "text\tlabel\nw1\t0\n", [], "no column 'sentence'"),
        ("adapt", "a.tsv", "sentence\tlabel\nw1\tmaybe\n", [], "a.tsv:2 has the label 'maybe'"),
        ("adapt", "a.tsv", "sentence\tlabel\nw1\t0\n", ["--template", "{x}"], "no column 'x'"),
        ("adapt", "a.tsv", "sentence\tlabel\nw1\t0\n", ["--template", "{}"], "must name columns"),
        ("adapt", "a.tsv", "sentence\tlabel\nw1\t0\n", ["--template", "x"], "must name columns"),
        ("adapt", "a.tsv", "sentence\tlabel\nw1\t0\n", ["--ratios", "1"], "ratios must be >= 2"),
        ("adapt", "a.tsv", "sentence\tlabel\nw1\t0\n", ["--ratios", "x"], "integers >= 2, got 'x'"),
        ("adapt", "a.tsv", TASK, ["--keep-first", "-1"], "keep_first must be >= 0, got -1"),
        ("adapt", "a.tsv", TASK, ["--keep-last", "-1"], "keep_last must be >= 0, got -1"),
        ("adapt", "a.tsv", TASK, ["--keep", "x"], "keep must be integers >= 0, got 'x'"),
        ("adapt", "a.tsv", TASK, ["--keep", "5,99999"], "keep must hold token ids below the voc"),
        ("adapt", "none.tsv", None, [], "there is no .*none.tsv"),
        (
            "pretrain",
            "text.txt",
            "w1 " * 20,
            ["--task_weight", "1"],
            "task_weight .* must be 0 in pretr",
        ),
        ("adapt", "a.tsv", "", ["--splice", "2"], "splice must be a part from 0 to 1, got 2"),
        ("adapt", "a.tsv", "", ["--splice", "1", "--task_weight", "1"], "got 1.0 and 1.0"),
        ("adapt", "a.tsv", "", ["--max-length", "0"], "max_length must be .* >= 1, got 0"),
        ("adapt", "a.tsv", "", ["--calibrate", "9"], "calibrate must be 0 or at least 10 .* got 9"),
        ("adapt", "a.tsv", "", ["--resume_from_checkpoint", "x"], "must not be given.* got 'x'"),
        ("pretrain", "a.tsv", "a\tb\n1\t2\n", ["--text", "c"], "no column 'c'"),
        ("pretrain", "a.tsv", "", ["--text", "a,b"], "text must name one column in pretrain"),
        ("adapt", "a.csv", "x", [], "data must be a .txt, .tsv, .jsonl or .json file, got"),
    ],
)
def test_refuses_bad_data_and_leaves_the_output_alone(
    folder, tmp_path, step, name, content, more, message
):
    if content is not None:
        (tmp_path / name).write_text(content)
    output = tmp_path / "output"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(command(folder, output, step, str(tmp_path / name), "--max_steps", "1", *more))
    assert not output.exists()


def test_plain_text_from_a_column(folder, tmp_path):
    text = (folder / "text.txt").read_text().splitlines()
    (tmp_path / "a.tsv").write_text("\n".join(["n\tbody", *(f"1\t{line}" for line in text)]))
    more = ["--max_steps", "2", "--save_steps", "2"]
    main(command(folder, tmp_path / "a", "pretrain", "text.txt", *more))
    table = str(tmp_path / "a.tsv")
    main(command(folder, tmp_path / "b", "pretrain", table, *more, "--text", "body"))
    a, b = (load_file(tmp_path / name / "plugins.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("given", "near"),
    [("--max_length", "--max-length"), ("--layer_wieght=3", "--layer_weight"), ("--q", "--help")],
)
def test_an_unknown_option_names_one_that_is_like_it(folder, tmp_path, capsys, given, near):
    with pytest.raises(SystemExit):
        main(command(folder, tmp_path / "output", "pretrain", "text.txt", given, "64"))
    assert f"unknown option {given}" in (text := capsys.readouterr().err) and near in text


@pytest.mark.parametrize("level", ["4", "[]", "{}", "null"])
def test_a_level_names_placements(folder, tmp_path, capsys, level):
    with pytest.raises(SystemExit):
        main(command(folder, tmp_path / "output", "pretrain", "text.txt", "--level", level))
    assert f'must be a JSON object of placements, such as {{"ffn": 4}}, got {level}' in (
        capsys.readouterr().err
    )


def test_data_that_changed_are_another_run(folder, tmp_path, caplog):
    data = tmp_path / "a.txt"
    data.write_text((folder / "text.txt").read_text())
    arguments = command(folder, tmp_path / "output", "pretrain", str(data), "--max_steps", "1")
    main(arguments)
    assert not caplog.messages
    main(arguments)
    assert "finished: there is nothing to do" in caplog.text
    (tmp_path / "output" / "metrics.json").unlink()
    main(arguments)
    assert "it goes on from checkpoint-1" in caplog.text
    data.write_text(data.read_text() + "w1 w2 w3 w4 w5 w6 w7 w8 w9\n")
    with pytest.raises(ValueError, match="holds a run whose data had another content"):
        main(arguments)


@pytest.mark.parametrize("name", ["model", "plugins"])
def test_a_model_or_plugins_that_changed_are_another_run(folder, tmp_path, name):
    """The same path, other weights: checkpoints of the one say nothing of the other."""
    model, start = tmp_path / "model", tmp_path / "start"
    shutil.copytree(folder / "model", model)
    first = command(folder, start, "pretrain", "text.txt", "--max_steps", "1")
    main([*first, "--model", str(model)])
    again = command(folder, tmp_path / "output", "pretrain", "text.txt", "--max_steps", "1")
    again += ["--model", str(model), "--plugins", str(start)]
    main(again)
    (tmp_path / "output" / "metrics.json").unlink()
    main(again)  # metrics are no part of what was read
    (file,) = (model if name == "model" else start).glob("*.safetensors")
    tensors = load_file(file)
    save_file({key: value + 1 for key, value in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"holds a run whose {name} had another content"):
        main(again)
    settings = json.loads((tmp_path / "output" / "run.json").read_text())
    del settings["sha256"][name]  # as an older version wrote it
    (tmp_path / "output" / "run.json").write_text(json.dumps(settings))
    main(again)


def test_refuses_an_output_of_others(folder, tmp_path):
    with pytest.raises(ValueError, match=r"output must be a folder of its own, .* holds a model"):
        main(command(folder, folder / "model", "pretrain", "text.txt", "--max_steps", "1"))
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match="holds another program's checkpoints"):
        main(command(folder, tmp_path, "pretrain", "text.txt", "--max_steps", "1"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        main(command(folder, tmp_path / "file", "pretrain", "text.txt", "--max_steps", "1"))


def test_takes_from_plugins_what_is_not_asked_for(folder, tmp_path):
    saved = patch(AutoModel.from_pretrained(folder / "model"), 3, (3, 5), 4, "identity")
    save_plugins(saved, tmp_path)
    job = Job("adapt", str(folder / "model"), "", "", plugins=str(tmp_path), backend="reference")
    model = AutoModel.from_pretrained(folder / "model")
    plugged(model, job)
    (state,) = states(model)
    found = state.method.config
    assert (found.placements, found.bottleneck) == ({"ffn": (3, 5)}, 4)
    assert (found.activation, found.backend) == ("identity", "reference")
    for a, b in zip(plugin_parameters(saved), plugin_parameters(model), strict=True):
        assert torch.equal(a, b)
    for wrong in ({"bottleneck": 5}, {"activation": "tanh"}, {"ratios": (3,)}):
        with pytest.raises(ValueError, match=f"source .* has {next(iter(wrong))} .*the model has"):
            plugged(AutoModel.from_pretrained(folder / "model"), replace(job, **wrong))


def test_keeps_tokens_whole_and_hands_them_on(folder, tmp_path):
    """Saved, taken from plugins where nobody says, refused where somebody says otherwise."""
    more = ["--max_steps", "2", "--calibrate", "10", "--save_steps", "1"]
    kept = ["--keep-first", "1", "--keep-last", "2", "--keep", "7,5", "3"]
    main(command(folder, tmp_path / "a", "pretrain", "text.txt", *more, *kept))
    main(command(folder, tmp_path / "none", "pretrain", "text.txt", *more, "--keep-first", "0"))
    adapt = ["--plugins", str(tmp_path / "a"), "--max_steps", "1"]
    main(command(folder, tmp_path / "b", "adapt", "task.tsv", *adapt))
    for place in ("a", "a/checkpoint-1", "b"):
        saved = json.loads((tmp_path / place / "plugins.json").read_text())
        assert [saved[name] for name in ("keep_first", "keep_last", "keep")] == [1, 2, [3, 5, 7]]
    a, none = (load_file(tmp_path / name / "plugins.safetensors") for name in ("a", "none"))
    assert any(not torch.equal(a[key], none[key]) for key in a)
    with pytest.raises(ValueError, match="has plugins for keep_first=1, the model was patched"):
        main(command(folder, tmp_path / "c", "adapt", "task.tsv", *adapt, "--keep-first", "0"))
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match=r"holds a run with keep_last=2, now it is None"):
        main(command(folder, tmp_path / "a", "pretrain", "text.txt", *more, *kept[:2]))


def test_a_resumed_run_keeps_what_its_checkpoint_keeps(folder, tmp_path):
    """Also where the family's default has changed since."""
    model = AutoModel.from_pretrained(folder / "model")
    plugged(model, Job("pretrain", str(folder / "model"), "", "", ratios=(2,), keep_first=1))
    save_plugins(model, tmp_path)
    later = AutoModel.from_pretrained(folder / "model")
    plugged(later, Job("pretrain", str(folder / "model"), "", "", plugins=str(tmp_path)))
    assert states(later)[0].kept == (1, 0, (), 64, ())


def test_the_same_run_by_another_name_of_its_folder_goes_on(folder, tmp_path):
    main(command(folder, tmp_path / "a", "pretrain", "text.txt", "--max_steps", "1"))
    main(command(folder, f"{tmp_path}/a/", "pretrain", "text.txt", "--max_steps", "1"))
    more = ["--max_steps", "1", "--adam_beta1", "0.5"]
    with pytest.raises(ValueError, match=r"holds a run with adam_beta1=0\.9, now it is 0\.5"):
        main(command(folder, tmp_path / "a", "pretrain", "text.txt", *more))


def test_refuses_to_adapt_what_has_no_head(folder, tmp_path):
    config = BertConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(tmp_path / "base")
    toy.tokenizer().save_pretrained(tmp_path / "base")
    more = ["--max_steps", "1", "--model", str(tmp_path / "base")]
    with pytest.raises(ValueError, match=r"must be fine-tuned .*base has no classifier.bias"):
        main(command(folder, tmp_path / "output", "adapt", "task.tsv", *more))
    assert load(Job("pretrain", str(tmp_path / "base"), "", ""))[0].config.model_type == "bert"


def test_an_error_is_one_line(folder, tmp_path):
    (tmp_path / "a.txt").touch()
    run = start(command(folder, tmp_path / "output", "pretrain", str(tmp_path / "a.txt")))
    text = run.communicate()[0]
    assert run.returncode == 1
    assert text.splitlines()[-1].startswith("error: data ") and "Traceback" not in text


@pytest.mark.parametrize(
    ("name", "text"), [("run.json", ""), ("run.json", "[]"), ("metrics.json", "{")]
)
def test_a_file_that_was_cut_off_is_named(folder, tmp_path, name, text):
    arguments = command(folder, tmp_path / "output", "pretrain", "text.txt", "--max_steps", "1")
    main(arguments)
    (tmp_path / "output" / name).write_text(text)
    with pytest.raises(
        ValueError, match=rf"{name} (holds no JSON|must hold a JSON object), remove it"
    ):
        main(arguments)


def test_a_broken_template_is_named(folder, tmp_path):
    arguments = command(folder, tmp_path / "output", "adapt", "task.tsv")
    with pytest.raises(ValueError, match=r"template must name columns: .*got '\{sentence S:'"):
        main([*arguments, "--template", "{sentence S:"])
