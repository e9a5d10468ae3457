"""Embedding models: folders of sentence-transformers, their own pooling, the loss behind it."""

import builtins
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModel, T5EncoderModel

import variator_kernels as vk
from tests.train import toy
from variator_kernels.train import Job, losses
from variator_kernels.train.__main__ import main
from variator_kernels.train.embeddings import Pooler, load

library = pytest.importorskip("sentence_transformers")
modules = library.sentence_transformer.modules
MORE = [
    "--bottleneck",
    "4",
    "--per_device_train_batch_size",
    "8",
    "--use_cpu",
    "--max-length",
    "24",
]
MORE += ["--ratios", "2", "4", "--max_steps", "2"]
PRETRAIN = [*MORE, "--noise", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("embedder")
    toy.bert(made / "plain")
    toy.embedder(made / "model", "mean")
    toy.plain_text(made / "text.txt")
    toy.table(made / "task.tsv")
    return made


def pretrain(folder, output, *more, model="model"):
    given = ["--model", str(folder / model), "--data", str(folder / "text.txt")]
    main(["pretrain", *given, "--output", str(output), *PRETRAIN, *more])


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "weightedmean"])
def test_pools_as_the_model_itself_does(tmp_path, mode):
    made = library.SentenceTransformer(toy.embedder(tmp_path, mode), device="cpu")
    model, tokenizer, pooler = load(tmp_path)
    texts = toy.sentences(7)
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    expected = torch.from_numpy(made.encode(texts, normalize_embeddings=True))
    found = pooler(model(**batch).last_hidden_state, batch)
    torch.testing.assert_close(found, expected)
    assert not any(p.requires_grad for p in pooler.parameters()) and not pooler.training


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "weightedmean"])
def test_neither_padding_nor_what_it_holds_counts(tmp_path, mode):
    _, _, pooler = load(toy.embedder(tmp_path, mode))
    hidden = torch.randn(2, 4, 16)

    def pooled(width, fill):
        mask, states = torch.zeros(2, width, dtype=torch.long), torch.full((2, width, 16), fill)
        for row, size in enumerate((4, 2)):
            mask[row, :size], states[row, :size] = 1, hidden[row, :size]
        states.requires_grad_(True)
        found = pooler(states, {"attention_mask": mask})
        found.sum().backward()
        return found.detach(), states.grad[:, :4] * mask[:, :4, None]

    plain = pooled(4, 0.0)
    for case in ((9, 1e3), (5, float("nan"))):
        for a, b in zip(pooled(*case), plain, strict=True):
            torch.testing.assert_close(a, b)


def test_the_loss_is_a_mean_over_rows_however_they_are_cut():
    def embed(hidden, batch):
        return normalize(hidden.sum(1), dim=-1)

    ours, theirs = torch.randn(5, 3, 6), torch.randn(5, 3, 6)
    mask = torch.tensor([[1, 1, 1]] * 4 + [[0, 0, 0]])  # a row without tokens is none

    def loss(rows, total):
        student, teacher = (SimpleNamespace(hidden_states=[x[rows]]) for x in (ours, theirs))
        batch = {"attention_mask": mask[rows]}
        return losses.embeddings(embed, student, teacher, batch, total)

    total = losses.counts({"attention_mask": mask})
    assert total.tolist() == [12, 0, 0, 4]
    whole = loss(slice(0, 5), total)
    cosines = cosine_similarity(ours[:4].sum(1), theirs[:4].sum(1))
    torch.testing.assert_close(whole, (1 - cosines).mean())
    torch.testing.assert_close(loss(slice(0, 1), total) + loss(slice(1, 5), total), whole)


def test_trains_what_loads_on_both_models(folder, tmp_path):
    output = tmp_path / "output"
    given = [
        "--embedding_weight",
        "3",
        "--calibrate",
        "12",
        "--eval-data",
        str(folder / "text.txt"),
    ]
    pretrain(folder, output, *given, "--max_steps", "40", "--learning_rate", "0.02")
    metrics = json.loads((output / "metrics.json").read_text())
    assert 0 < metrics["eval_k4_cosine"] <= 1 and metrics["eval_k2_cosine"] <= 1
    made = library.SentenceTransformer(str(folder / "model"), device="cpu")
    plain = AutoModel.from_pretrained(folder / "model").eval()
    texts = toy.sentences(30, 12, seed=5)
    dense = made.encode(texts, convert_to_tensor=True)
    for model in (made, plain):
        vk.load_plugins(model, output)
        vk.set_ratio(model, 2)
    found = made.encode(texts, convert_to_tensor=True)
    batch = made.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = plain(**batch).last_hidden_state
    torch.testing.assert_close(load(folder / "model")[2](hidden, batch), normalize(found))
    vk.unpatch(made)
    vk.patch(made, 2, bottleneck=4)
    untrained = made.encode(texts, convert_to_tensor=True)
    apart = [1 - cosine_similarity(x, dense).mean() for x in (found, untrained)]
    assert apart[0] < 0.9 * apart[1] and apart[1] > 1e-3


def test_the_weight_pulls_embeddings_together(folder, tmp_path):
    found = []
    for weight in ("0", "1000"):
        given = ["--embedding_weight", weight, "--eval-data", str(folder / "text.txt")]
        output = tmp_path / weight
        pretrain(folder, output, *given, "--max_steps", "30", "--learning_rate", "0.01")
        found.append(json.loads((output / "metrics.json").read_text())["eval_k4_cosine"])
    assert found[1] > found[0]


def test_accumulated_rows_train_as_one_batch(folder, tmp_path):
    given = ["--embedding_weight", "5", "--learning_rate", "0.01", "--warmup_steps", "0"]
    pretrain(folder, tmp_path / "one", *given)
    more = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    pretrain(folder, tmp_path / "four", *given, *more)
    one, four = (load_file(tmp_path / n / "plugins.safetensors") for n in ("one", "four"))
    for key, value in one.items():
        torch.testing.assert_close(four[key], value, atol=2 * 0.01 * 0.01, rtol=0)


@pytest.mark.parametrize(
    ("step", "model", "more", "message"),
    [
        ("pretrain", "plain", [], "embedding_weight .* must be a folder of sentence-transformers"),
        ("adapt", "model", [], "embedding_weight must be 0 in adapt"),
        ("pretrain", "model", ["--embedding_weight", "-1"], "embedding_weight must be a finite"),
        ("pretrain", "model", ["--noise", "some"], "noise must be one of .* got 'some'"),
        ("adapt", "model", ["--vary-lengths"], "vary_lengths .* in pretrain alone"),
    ],
)
def test_refuses_what_does_not_fit(folder, tmp_path, step, model, more, message):
    data = folder / "text.txt"
    given = ["--model", str(folder / model), "--data", str(data), "--embedding_weight", "1"]
    with pytest.raises(ValueError, match=message):
        main([step, *given, "--output", str(tmp_path / "output"), *MORE, *more])
    assert not (tmp_path / "output").exists()


def test_names_the_package_that_is_missing(folder, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **settings):
        if name.startswith("sentence_transformers"):
            raise ImportError(name)
        return real(name, *rest, **settings)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="pip install sentence-transformers"):
        load(folder / "model")


def test_refuses_models_that_do_not_pool_a_transformer(tmp_path):
    made = library.SentenceTransformer(
        modules=[modules.Transformer(str(toy.bert(tmp_path / "bert")))]
    )
    made.save(str(tmp_path / "tokens"))
    with pytest.raises(
        ValueError, match=r"must make one embedding of a text .* want 'sentence_embedding'"
    ):
        load(tmp_path / "tokens")


def test_a_pooler_travels_to_the_device_of_the_states():
    pooler = Pooler([])
    assert isinstance(pooler, torch.nn.Module)
    assert Job("pretrain", "", "", "").noise == "default"


def test_text_as_it_is(folder, tmp_path):
    """Without noise a pass trains on the text that is evaluated: the losses are one number."""
    more = ["--learning_rate", "0", "--logging_steps", "1", "--max_steps", "1", "--ratios", "2"]
    rows = len((folder / "text.txt").read_text().split("\n\n"))
    more += ["--per_device_train_batch_size", str(rows), "--eval-data", str(folder / "text.txt")]
    pretrain(folder, tmp_path / "a", *more)
    state = json.loads((tmp_path / "a" / "checkpoint-1" / "trainer_state.json").read_text())
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert state["log_history"][0]["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)


def test_short_and_long_pieces_of_mixed_rows_resume(folder, tmp_path):
    given = ["--vary-lengths", "--splice", "1", "--embedding_weight", "1", "--save_steps", "2"]
    given += ["--max_steps", "6"]
    pretrain(folder, tmp_path / "whole", *given)
    pretrain(folder, tmp_path / "cut", *given)
    for name in ("checkpoint-6", "checkpoint-4"):
        (tmp_path / "cut" / name / "complete").unlink()
        (tmp_path / "cut" / name / "started").touch()
    (tmp_path / "cut" / "metrics.json").unlink()
    pretrain(folder, tmp_path / "cut", *given)
    a, b = ((tmp_path / n / "plugins.safetensors").read_bytes() for n in ("whole", "cut"))
    assert a == b
    with pytest.raises(ValueError, match="holds a run with vary_lengths=True, now it is False"):
        pretrain(folder, tmp_path / "whole", *given[1:])


def test_a_run_of_an_older_version_goes_on(folder, tmp_path):
    """What its ``run.json`` does not hold was at its default."""
    given = ["adapt", "--model", str(folder / "plain"), "--data", str(folder / "task.tsv")]
    given += ["--output", str(tmp_path / "a"), *MORE]
    main(given)
    path = tmp_path / "a" / "run.json"
    content = json.loads(path.read_text())
    for name in ("noise", "vary_lengths", "embedding_weight"):
        del content[name]
    path.write_text(json.dumps(content))
    main(given)
    with pytest.raises(ValueError, match=r"run with logits_weight=0\.0, now it is 1\.0"):
        main([*given, "--logits_weight", "1"])


def test_embeds_in_full_precision_under_autocast(folder):
    """Autocast would round the layers behind the pooling, which the loss compares."""
    _, _, pooler = load(folder / "model")
    hidden, batch = torch.randn(3, 4, 16), {"attention_mask": torch.ones(3, 4)}
    expected = pooler(hidden, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pooler(hidden, batch), expected)


def test_an_encoder_out_of_an_encoder_decoder(tmp_path):
    """sentence-transformers takes the encoder of a T5 alone; it has no mask token."""
    toy.plain_text(tmp_path / "text.txt")
    first = modules.Transformer(str(toy.t5(tmp_path / "t5")))
    made = library.SentenceTransformer(modules=[first, modules.Pooling(16, "mean")], device="cpu")
    made.save(str(tmp_path / "model"))
    pretrain(tmp_path, tmp_path / "output", "--embedding_weight", "1", "--calibrate", "10")
    texts = toy.sentences(5)
    before = made.encode(texts)
    vk.load_plugins(made, tmp_path / "output")
    assert abs(made.encode(texts) - before).max() > 0
    assert isinstance(load(tmp_path / "model")[0], T5EncoderModel)


def test_refuses_a_model_without_a_transformer(tmp_path):
    static = modules.StaticEmbedding(toy.tokenizer(), embedding_dim=8)
    library.SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path))
    with pytest.raises(ValueError, match=r"must start with a transformer, got .* StaticEmbedding"):
        load(tmp_path)


def test_an_encoder_decoder_needs_its_noise(tmp_path):
    toy.plain_text(tmp_path / "text.txt")
    toy.t5(tmp_path / "model")
    with pytest.raises(ValueError, match="noise must be default for an encoder-decoder"):
        pretrain(tmp_path, tmp_path / "output")
    assert not (tmp_path / "output").exists()
